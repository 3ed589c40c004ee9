"""The sweep over gradients on the CPU: maxima and norms, before and after clipping, without a copy of any gradient."""

import math
from bisect import bisect_right
from typing import NamedTuple

import torch
from torch import Tensor

from hf_stablespam.optim.formulas import clip_spikes, safe_norm
from hf_stablespam.optim.pieces import Piece, Scratch, as_blocks, split
from hf_stablespam.optim.plan import Clipping

TINY = 1e-15  # below it squares leave the range of float32, and norms are computed the careful way


class Sweep(NamedTuple):
    """What one reading of a bucket's gradients found."""

    flat: list[Tensor]  # the gradients, each (entries,)
    pieces: list[Piece]
    squares: list[float]  # sum of squares of each piece
    block_max: Tensor  # max|g| of each block, (blocks of all tensors,)
    blocks: list[int]  # number of blocks of each tensor
    grad_max: Tensor  # max|g| of each tensor
    grad_norm: Tensor  # ‖g‖ of each tensor


class Patch(NamedTuple):
    """The blocks of a piece that hold spikes, clipped."""

    rows: Tensor  # (n,) indices of blocks in the piece
    values: Tensor  # (n, entries of a block)


class Clipped(NamedTuple):
    """What clipping changes."""

    patches: dict[int, Patch]  # by the index of the piece
    entries: Tensor  # how many entries were clipped, for each tensor
    norm: Tensor  # ‖g‖ after clipping, of each tensor


def sweep(flat: list[Tensor], scratch: Scratch) -> Sweep:
    """Measure gradients piece by piece: the maxima of blocks, and sums of squares.

    Args:
        flat: gradients as vectors.
        scratch: working memory; its dtype is that of the statistics.
    """
    pieces, highs, lows, squares = [], [], [], []
    blocks, count = [], 0
    for owner, grad in enumerate(flat):
        first = count
        for part, piece in enumerate(split(grad)):
            values = scratch.widened("grad", piece)
            rows = as_blocks(values)
            pieces.append(Piece(owner, part, piece, count))
            highs.append(rows.amax(1))
            lows.append(rows.amin(1))
            squares.append(torch.dot(values, values))
            count += rows.shape[0]
        blocks.append(count - first)
    block_max = torch.maximum(torch.cat(highs), -torch.cat(lows))
    grad_max = torch.stack(torch._foreach_max(block_max.split(blocks)))
    sums = torch.stack(squares).tolist()
    norm = _norms(pieces, sums, len(flat), scratch.dtype)
    for owner in _tiny(grad_max):
        norm[owner] = safe_norm(flat[owner].to(scratch.dtype), grad_max[owner])
    return Sweep(flat, pieces, sums, block_max, blocks, grad_max, norm)


def clip(swept: Sweep, clipping: Clipping, scratch: Scratch) -> Clipped:
    """Clip the blocks that hold entries above the threshold, and only these.

    Args:
        swept: the gradients and their measures.
        clipping: threshold and ratio of each tensor.
        scratch: working memory.
    """
    entries = [0] * len(swept.flat)
    rows_of = _rows_with_spikes(swept, clipping.threshold)
    if not rows_of:
        return Clipped({}, torch.tensor(entries), swept.grad_norm)
    thresholds, ratios = clipping.threshold.tolist(), clipping.ratio.tolist()
    patches, squares = {}, list(swept.squares)
    for index, rows in rows_of.items():
        piece, chosen = swept.pieces[index], torch.tensor(rows)
        old = as_blocks(piece.grad).index_select(0, chosen).to(scratch.dtype)
        new, count = clip_spikes(old, thresholds[piece.owner], ratios[piece.owner])
        patches[index] = Patch(chosen, new)
        entries[piece.owner] += int(count)
        squares[index] = _squares_after(piece, squares[index], old, patches[index], scratch)
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


def _rows_with_spikes(swept: Sweep, threshold: Tensor) -> dict[int, list[int]]:
    """For each piece with an entry above the threshold: which of its blocks have one."""
    limits = threshold.repeat_interleave(torch.tensor(swept.blocks), output_size=len(swept.block_max))
    starts = [piece.first_block for piece in swept.pieces]
    found: dict[int, list[int]] = {}
    for block in (swept.block_max > limits).nonzero().flatten().tolist():
        index = bisect_right(starts, block) - 1
        found.setdefault(index, []).append(block - starts[index])
    return found


def _squares_after(piece: Piece, square: float, old: Tensor, patch: Patch, scratch: Scratch) -> float:
    """The piece's sum of squares after clipping; summed anew where a difference would lose digits."""
    added = float(torch.dot(patch.values.view(-1), patch.values.view(-1)))
    if old.numel() == piece.grad.numel():
        return added
    removed = float(torch.dot(old.view(-1), old.view(-1)))
    if removed < 0.5 * square:
        return square - removed + added
    values = scratch.take("grad", piece.grad.numel()).copy_(piece.grad)
    as_blocks(values).index_copy_(0, patch.rows, patch.values)
    return float(torch.dot(values, values))
