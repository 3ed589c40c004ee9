"""One gradient on the CPU measured and clipped: maximum and norm, before and after clipping, without a copy of it."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hf_stablespam.optim.formulas import clip_spikes, safe_norm
from hf_stablespam.optim.pieces import LONG, PIECE, Scratch, cut

TINY = 1e-15  # below it squares leave the range of float32, and norms are computed the careful way
MANY = 64  # spikes; with more, the gradient is clipped in copies of its pieces
BLOCK = 1 << 10  # entries that share one maximum


class Part(NamedTuple):
    """Consecutive entries of a gradient, and what reading them found."""

    grad: Tensor  # (entries,)
    low: float  # smallest entry
    high: float  # largest entry
    square: float  # sum of squares


class Measured(NamedTuple):
    """One gradient before clipping."""

    flat: Tensor  # (entries,)
    parts: list[Part]
    grad_max: float  # max|g|
    square: float  # ‖g‖²; not finite if any entry is not, or if it leaves the range of the statistics' dtype


class Limits(NamedTuple):
    """AdaClip for one tensor."""

    threshold: float  # T̂, a number of the working dtype
    ratio: float  # T̂/gmax


class Spike(NamedTuple):
    """An entry above the threshold."""

    place: int  # index in the flattened gradient
    entry: Tensor  # 0-dimensional, a view of the gradient
    value: float


class Clipped(NamedTuple):
    """What clipping changes."""

    spikes: list[Spike] | None  # None: they are many, or nearly all of the norm
    entries: int  # how many were clipped
    square: float  # ‖g‖² after clipping


def measure(flat: Tensor, scratch: Scratch) -> Measured:
    """Read a gradient: its largest entry, and the sum of squares while it is still in the cache.

    Args:
        flat: the gradient as a vector.
        scratch: working memory; its dtype is that of the statistics.
    """
    parts = []
    grad_max = square = 0.0
    for grad in cut(flat, LONG if flat.dtype == scratch.dtype else PIECE):
        values = scratch.widened("grad", grad)
        low, high = torch.aminmax(values)
        parts.append(Part(grad, low.item(), high.item(), _square(values)))
        grad_max = max(grad_max, parts[-1].high, -parts[-1].low)
        square += parts[-1].square
    if not square <= scratch.largest:
        return Measured(flat, parts, math.nan if math.isnan(square) else grad_max, square * math.inf)
    if 0 < grad_max < TINY:
        square = _careful_square(flat.to(scratch.dtype), grad_max)
    return Measured(flat, parts, grad_max, square)


def clip(measured: Measured, limits: Limits, scratch: Scratch) -> Clipped:
    """Find the entries above the threshold; the gradient stays as it is.

    In an ordinary step every second tensor has one or two, so they are clipped one by one.

    Args:
        measured: the gradient, from `measure`.
        limits: threshold and ratio.
        scratch: working memory.
    """
    threshold, ratio = limits
    if not measured.grad_max > threshold:
        return Clipped([], 0, measured.square)
    if measured.grad_max < TINY:
        clipped, entries = clip_spikes(measured.flat.to(scratch.dtype), *limits)
        return Clipped(None, int(entries), _careful_square(clipped, measured.grad_max))
    spikes = find_spikes(measured, threshold)
    removed = sum(spike.value * spike.value for spike in spikes or []) * (1 - ratio * ratio)
    if spikes is None or removed > 0.5 * measured.square:  # the difference would lose digits
        return _clip_copies(measured, limits, scratch)
    return Clipped(spikes, len(spikes), measured.square - removed)


def find_spikes(measured: Measured, threshold: float) -> list[Spike] | None:
    """The entries above the threshold; ``None`` if they are many."""
    found: list[Spike] = []
    first = 0
    for part in measured.parts:
        for side, extreme in ((1, part.high), (-1, part.low)):
            if side * extreme > threshold and len(found) <= MANY:
                found += _search(part.grad, threshold, side, first)
        first += part.grad.numel()
    return found if len(found) <= MANY else None


def _search(values: Tensor, threshold: float, side: int, first: int) -> list[Spike]:
    """The entries of one sign above the threshold.

    The maxima of blocks say in which blocks they are, and only these blocks are read again.

    Args:
        values: a vector.
        threshold: ``T̂``.
        side: 1 for positive entries, −1 for negative ones.
        first: the place of the first value in the gradient.

    Returns:
        All of them, or more than ``MANY``.
    """
    entries = values.numel()
    rest = entries % BLOCK
    starts = [entries - rest] if rest else []
    if entries > rest:
        rows = (values[: entries - rest] if rest else values).view(-1, BLOCK)
        starts += [row * BLOCK for row in _above(rows.amax(1) if side > 0 else rows.amin(1), threshold, side)]
    found: list[Spike] = []
    for start in starts:
        block = values[start : start + BLOCK]
        for index in _above(block, threshold, side)[: MANY + 1]:
            entry = block[index]
            found.append(Spike(first + start + index, entry, entry.item()))
        if len(found) > MANY:
            break
    return found


def _above(values: Tensor, threshold: float, side: int) -> list[int]:
    """Where values are above a threshold, or (side −1) below its negative."""
    if values.dtype in (torch.bfloat16, torch.float16):
        values = values.float()  # else the threshold would be rounded
    above = values > threshold if side > 0 else values < -threshold
    return [index for (index,) in above.nonzero().tolist()]


def scale_spikes(spikes: list[Spike], ratio: float) -> None:
    """Clip the gradient's spikes, or (by a ratio of 1) put them back exactly as they were."""
    for spike in spikes:
        spike.entry.fill_(spike.value * ratio)


def clip_copy(work: Tensor, start: int, spikes: list[Spike] | None, limits: Limits) -> None:
    """Clip a copy of a piece of the gradient.

    Args:
        work: the copy, which is changed.
        start: the place of its first entry in the gradient.
        spikes: those of the gradient, if they are known one by one.
        limits: threshold and ratio.
    """
    if spikes is None:
        clip_all(work, limits)
        return
    for spike in spikes:
        if start <= spike.place < start + work.numel():
            work[spike.place - start] = spike.value * limits.ratio


def clip_all(work: Tensor, limits: Limits) -> Tensor:
    """Clip a vector that may be changed; return one that is zero where nothing was clipped."""
    spikes = torch.nn.functional.hardshrink(work, limits.threshold)
    work.sub_(spikes).add_(spikes, alpha=limits.ratio)
    return spikes


def _careful_square(values: Tensor, grad_max: float) -> float:
    return safe_norm(values, torch.tensor(grad_max, dtype=values.dtype)).item() ** 2


def _square(values: Tensor) -> float:
    return torch.dot(values, values).item()


def _clip_copies(measured: Measured, limits: Limits, scratch: Scratch) -> Clipped:
    """Count and measure what is clipped on copies of pieces, where there are many spikes or nothing else."""
    square, entries = 0.0, 0
    for grad in cut(measured.flat, PIECE):
        values = scratch.copied("grad", grad)
        entries += int(clip_all(values, limits).count_nonzero())
        square += _square(values)
    return Clipped(None, entries, square)
