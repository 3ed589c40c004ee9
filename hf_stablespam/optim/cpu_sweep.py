"""One gradient on the CPU measured and clipped: maximum and norm, before and after clipping, without a copy of it."""

import math
import warnings
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

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
    maxima: Any  # (blocks,) the largest |entry| of each block of 1024, from `compiled_sweep`; None without it


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
        parts.append(_read(grad, values))
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


def _read(grad: Tensor, values: Tensor) -> Part:
    """Measure consecutive entries, which are also given in the working dtype."""
    compiled = compiled_sweep()
    if compiled is None or values is not grad:
        low, high = torch.aminmax(values)
        return Part(grad, low.item(), high.item(), _square(values), None)
    grad_max, square, maxima = compiled.read(grad)
    return Part(grad, -grad_max, grad_max, square, maxima)


@cache
def compiled_sweep() -> ModuleType | None:
    """`hf_stablespam.optim.compiled_sweep`, or ``None`` where Numba is not installed or cannot be used."""
    if find_spec("numba") is None:
        return None
    try:
        from hf_stablespam.optim import compiled_sweep as compiled
    except ImportError as error:  # it does not fit the NumPy beside it
        warnings.warn(f"numba is installed but cannot be used, so steps on the CPU are slower: {error}", stacklevel=2)
        return None
    return compiled


def find_spikes(measured: Measured, threshold: float) -> list[Spike] | None:
    """The entries above the threshold; ``None`` if they are many."""
    found: list[Spike] = []
    first = 0
    for part in measured.parts:
        if max(part.high, -part.low) > threshold and len(found) <= MANY:
            found += _search(part, threshold, first)
        first += part.grad.numel()
    return found if len(found) <= MANY else None


def _search(part: Part, threshold: float, first: int) -> list[Spike]:
    """The entries above the threshold: all of them, or more than ``MANY``.

    Args:
        part: some of a gradient.
        threshold: ``T̂``.
        first: the place of its first entry in the gradient.
    """
    compiled = compiled_sweep()
    if compiled is None or part.maxima is None:
        places = _places_above(part, threshold)
    else:
        places = compiled.find(part.grad, part.maxima, threshold, MANY + 1)
    entries = [part.grad[place] for place in places]
    return [Spike(first + place, entry, entry.item()) for place, entry in zip(places, entries, strict=True)]


def _places_above(part: Part, threshold: float) -> list[int]:
    """Where entries are above the threshold, or more than ``MANY`` of these; only blocks with such are read again."""
    places: list[int] = []
    for start in _blocks_above(part, threshold):
        if len(places) > MANY:
            break
        places += [start + index for index in _above(part.grad[start : start + BLOCK].abs(), threshold)]
    return places[: MANY + 1]


def _blocks_above(part: Part, threshold: float) -> list[int]:
    """Where the blocks begin that may hold an entry above the threshold."""
    entries = part.grad.numel()
    whole = entries - entries % BLOCK
    rows = part.grad[:whole].view(-1, BLOCK)
    above = set(_above(rows.amax(1), threshold)) if part.high > threshold else set()
    if -part.low > threshold:
        above.update(_above(-rows.amin(1), threshold))
    return [row * BLOCK for row in sorted(above)] + ([whole] if whole < entries else [])


def _above(values: Tensor, threshold: float) -> list[int]:
    """Where values are above a threshold."""
    if values.dtype in (torch.bfloat16, torch.float16):
        values = values.float()  # else the threshold would be rounded
    return [index for (index,) in (values > threshold).nonzero().tolist()]


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
