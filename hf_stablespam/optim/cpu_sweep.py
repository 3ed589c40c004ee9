"""The sweep over gradients on the CPU: maxima and norms, before and after clipping, without a copy of any gradient."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hf_stablespam.optim.formulas import clip_spikes, safe_norm
from hf_stablespam.optim.pieces import Piece, Scratch, as_blocks, split
from hf_stablespam.optim.plan import Clipping

TINY = 1e-15  # below it squares leave the range of float32, and norms are computed the careful way


class Sweep(NamedTuple):
    """What one reading of a set of gradients found."""

    flat: list[Tensor]  # the gradients, each (entries,)
    pieces: list[Piece]
    squares: list[float]  # sum of squares of each piece
    highs: list[float]  # largest entry of each piece
    lows: list[float]  # smallest entry of each piece
    grad_max: Tensor  # max|g| of each tensor
    grad_norm: Tensor  # ‖g‖ of each tensor


class Patch(NamedTuple):
    """The blocks of a piece that hold spikes, before and after clipping."""

    rows: Tensor  # (n,) indices of blocks in the piece
    limits: tuple[float, float]  # T̂ and T̂/gmax
    kept: tuple[Tensor, Tensor] | None  # what `blocks` returns, where there is room to keep it

    def blocks(self, piece: Piece, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The blocks as the gradient has them, and with their spikes scaled down; each (n, entries of a block)."""
        if self.kept is not None:
            return self.kept
        old = self.original(piece, dtype)
        return old, clip_spikes(old, *self.limits)[0]

    def original(self, piece: Piece, dtype: torch.dtype) -> Tensor:
        """The blocks as the gradient has them."""
        return as_blocks(piece.grad).index_select(0, self.rows).to(dtype)


class _Spiked(NamedTuple):
    """A piece with spikes, while its sum of squares is brought up to date."""

    number: int  # of the piece
    rows: Tensor  # (n,)
    old: Tensor  # (n, entries of a block)
    new: Tensor
    clipped: Tensor  # how many entries


class Clipped(NamedTuple):
    """What clipping changes."""

    patches: dict[int, Patch]  # by the index of the piece
    entries: Tensor  # how many entries were clipped, for each tensor
    norm: Tensor  # ‖g‖ after clipping, of each tensor


def sweep(flat: list[Tensor], scratch: Scratch) -> Sweep:
    """Measure gradients piece by piece: largest and smallest entries, and sums of squares.

    Args:
        flat: gradients as vectors.
        scratch: working memory; its dtype is that of the statistics.
    """
    pieces, squares, counts = [], [], []
    extremes: list[Tensor] = []
    for owner, grad in enumerate(flat):
        parts = split(grad)
        counts.append(len(parts))
        for part, piece in enumerate(parts):
            values = scratch.widened("grad", piece)
            pieces.append(Piece(owner, part, piece))
            extremes += torch.aminmax(values)
            squares.append(torch.dot(values, values))
    bounds = torch.stack(extremes).view(-1, 2)
    grad_max = torch.stack(torch._foreach_max(bounds.abs().amax(1).split(counts)))
    sums = torch.stack(squares).tolist()
    norm = _norms(pieces, sums, len(flat), scratch.dtype)
    for owner in _tiny(grad_max):
        norm[owner] = safe_norm(flat[owner].to(scratch.dtype), grad_max[owner])
    lows, highs = bounds.t().tolist()
    return Sweep(flat, pieces, sums, highs, lows, grad_max, norm)


def clip(swept: Sweep, clipping: Clipping, scratch: Scratch) -> Clipped:
    """Clip the blocks that hold entries above the threshold, and only these.

    Args:
        swept: the gradients and their measures.
        clipping: threshold and ratio of each tensor.
        scratch: working memory.
    """
    thresholds, ratios = clipping.threshold.tolist(), clipping.ratio.tolist()
    entries, squares = [0] * len(swept.flat), list(swept.squares)
    patches: dict[int, Patch] = {}
    group: list[_Spiked] = []
    room = max(grad.numel() for grad in swept.flat)  # what is alive is together no larger than the largest tensor
    for index, (piece, low, high) in enumerate(zip(swept.pieces, swept.lows, swept.highs, strict=True)):
        limits = thresholds[piece.owner], ratios[piece.owner]
        if high > limits[0] or low < -limits[0]:
            patch = Patch(_rows_with_spikes(piece, limits[0], low, high, scratch.dtype), limits, None)
            old = patch.original(piece, scratch.dtype)
            new, count = clip_spikes(old, *limits)
            keep = 2 * new.numel() <= room
            patches[index] = patch._replace(kept=(old, new)) if keep else patch
            group.append(_Spiked(index, patch.rows, old, new, count))
            if keep:
                room -= 2 * new.numel()
            else:
                _settle(group, swept, entries, squares, scratch)
                group = []
    _settle(group, swept, entries, squares, scratch)
    if not patches:
        return Clipped(patches, torch.tensor(entries), swept.grad_norm)
    norm = _norms(swept.pieces, squares, len(swept.flat), scratch.dtype)
    for owner in _tiny(swept.grad_max):
        clipped, _ = clip_spikes(swept.flat[owner].to(scratch.dtype), thresholds[owner], ratios[owner])
        norm[owner] = safe_norm(clipped, swept.grad_max[owner])
    return Clipped(patches, torch.tensor(entries), norm)


def _tiny(grad_max: Tensor) -> list[int]:
    return [owner for owner, largest in enumerate(grad_max.tolist()) if 0 < largest < TINY]


def _norms(pieces: list[Piece], squares: list[float], tensors: int, dtype: torch.dtype) -> Tensor:
    """The norm of each tensor from the sums of squares of its pieces, added in float64."""
    totals = [0.0] * tensors
    for piece, square in zip(pieces, squares, strict=True):
        totals[piece.owner] += square
    return torch.tensor([math.sqrt(total) for total in totals], dtype=dtype)


def _rows_with_spikes(piece: Piece, threshold: float, low: float, high: float, dtype: torch.dtype) -> Tensor:
    """Which blocks have an entry above the threshold; only the sides that have one are searched."""
    blocks = as_blocks(piece.grad)
    if low >= -threshold:
        spiked = blocks.amax(1).to(dtype) > threshold
    elif high <= threshold:
        spiked = blocks.amin(1).to(dtype) < -threshold
    else:
        spiked = torch.maximum(blocks.amax(1), -blocks.amin(1)).to(dtype) > threshold
    return spiked.nonzero().view(-1)


def _settle(group: list[_Spiked], swept: Sweep, entries: list[int], squares: list[float], scratch: Scratch) -> None:
    """Enter what clipping changed: the number of clipped entries of the tensors, the sums of squares of the pieces."""
    if not group:
        return
    norms = torch._foreach_norm([spiked.old for spiked in group] + [spiked.new for spiked in group])
    removed, added = torch.stack(norms).double().square().view(2, -1).tolist()
    counts = torch.stack([spiked.clipped for spiked in group]).tolist()
    for spiked, before, after, count in zip(group, removed, added, counts, strict=True):
        piece = swept.pieces[spiked.number]
        entries[piece.owner] += count
        if spiked.old.numel() == piece.grad.numel():
            squares[spiked.number] = after
        elif before < 0.5 * squares[spiked.number]:
            squares[spiked.number] += after - before
        else:  # the difference would lose digits
            values = scratch.take("grad", piece.grad.numel()).copy_(piece.grad)
            as_blocks(values).index_copy_(0, spiked.rows, spiked.new)
            squares[spiked.number] = float(torch.dot(values, values))
