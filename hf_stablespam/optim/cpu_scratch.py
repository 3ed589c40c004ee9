"""PyTorch's fused AdamW on stabilised copies of pieces of the gradient, small tensors together in one call.

For tensors that `cpu_direct` does not take. Parameters or moments of fewer bits are widened to float32 piece by
piece, and rounded once when they go back.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from hf_stablespam.optim.cpu_sweep import Patch
from hf_stablespam.optim.pieces import PIECE, Piece, Scratch, as_blocks, flat_view, split
from hf_stablespam.optim.plan import Batch, Options, Plan, State
from hf_stablespam.optim.rounding import store


class Stored(NamedTuple):
    """One piece of weight and moments, as they are stored."""

    weight: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


class Work(NamedTuple):
    """One piece, ready for the fused AdamW: tensors of the working dtype, and what they were made of."""

    weight: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    moment_step: Tensor
    stored: Stored


class Numbers(NamedTuple):
    """What the update needs of the plan, as Python numbers with one entry per tensor."""

    factor: list[float]
    carry: list[float]
    carry_sq: list[float]
    beta1: list[float]


def scratch_update(
    batch: Batch, pieces: dict[int, Piece], patches: dict[int, Patch], plan: Plan, options: Options, scratch: Scratch
) -> None:
    """Update the tensors of these pieces.

    Args:
        batch: parameters, gradients, states; the counters are already this step's.
        pieces: all pieces of the tensors to be updated, by their index.
        patches: blocks with spikes, by the index of their piece.
        plan: this step's plan.
        options: the parameter group.
        scratch: working memory.
    """
    numbers = Numbers(*(getattr(plan, name).tolist() for name in Numbers._fields))
    owners = {piece.owner for piece in pieces.values()}
    parts = {owner: _stored(batch.params[owner], batch.states[owner]) for owner in owners}
    works: list[Work] = []
    filled, beta1 = 0, 0.0
    for index, piece in pieces.items():
        owner, entries = piece.owner, piece.grad.numel()
        if works and (filled + entries > PIECE or numbers.beta1[owner] != beta1):
            _adamw(works, beta1, options)
            works, filled = [], 0
        grad = _stabilized(piece, patches.get(index), numbers.factor[owner], scratch, filled)
        carries = numbers.carry[owner], numbers.carry_sq[owner]
        moment_step = batch.states[owner]["moment_step"]
        works.append(_work(grad, parts[owner][piece.part], moment_step, carries, scratch, filled))
        filled, beta1 = filled + entries, numbers.beta1[owner]
    _adamw(works, beta1, options)


def _stored(param: Tensor, state: State) -> list[Stored]:
    """Weight and moments, cut like the gradient."""
    tensors = (param.detach(), state["exp_avg"], state["exp_avg_sq"])
    return [Stored(*parts) for parts in zip(*(split(flat_view(tensor)) for tensor in tensors), strict=True)]


def _stabilized(piece: Piece, patch: Patch | None, factor: float, scratch: Scratch, offset: int) -> Tensor:
    """A scratch copy of a piece of the gradient, clipped and normalised."""
    target = scratch.take("grad", piece.grad.numel(), offset)
    if piece.grad.dtype == target.dtype:
        torch.mul(piece.grad, factor, out=target)
    else:  # `out=` would multiply in the gradient's dtype
        target.copy_(piece.grad).mul_(factor)
    if patch is not None:
        as_blocks(target).index_copy_(0, patch.rows, patch.blocks(piece, target.dtype)[1] * factor)
    return target


def _work(
    grad: Tensor, stored: Stored, moment_step: Tensor, carries: tuple[float, float], scratch: Scratch, offset: int
) -> Work:
    weight, exp_avg, exp_avg_sq = (scratch.widened(role, getattr(stored, role), offset) for role in Stored._fields)
    if carries != (1, 1):
        exp_avg.mul_(carries[0])
        exp_avg_sq.mul_(carries[1])
    return Work(weight, grad, exp_avg, exp_avg_sq, moment_step, stored)


def _adamw(works: list[Work], beta1: float, options: Options) -> None:
    """PyTorch's own fused AdamW on the pieces, then back to storage what was widened."""
    if not works:
        return
    weights, grads, exp_avgs, exp_avg_sqs, steps, _ = (list(column) for column in zip(*works, strict=True))
    torch._fused_adamw_(
        weights,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        lr=float(options["lr"]),
        beta1=beta1,
        beta2=options["betas"][1],
        weight_decay=options["weight_decay"],
        eps=options["eps"],
        amsgrad=False,
        maximize=options["maximize"],
    )
    for work in works:
        if work.stored.weight is not work.weight:
            store(work.stored.weight, work.weight, stochastic=options["stochastic_rounding"])
        if work.stored.exp_avg is not work.exp_avg:
            work.stored.exp_avg.copy_(work.exp_avg)
            work.stored.exp_avg_sq.copy_(work.exp_avg_sq)
