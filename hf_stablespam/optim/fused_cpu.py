"""The fast path on the CPU: one sweep over the gradients for maxima and norms, one through PyTorch's fused AdamW.

What makes it fast is that what is needed twice is still in the processor's cache the second time:

* gradients are measured in pieces: the maximum of each block of 1024 entries, and the sum of squares of the piece;
* the sum of squares after clipping differs only by the few entries above the threshold; the maxima of the blocks say
  in which blocks those are, and only these blocks are read again;
* AdaGN is one factor per tensor. It is multiplied into a scratch copy of a piece of the gradient (``p.grad`` stays as
  it was found), the clipped blocks are put in, and `torch._fused_adamw_` runs on that piece alone;
* tensors are taken in buckets, so that a gradient is still in the last-level cache when its update comes.

Parameters or moments of fewer bits are widened to float32 piece by piece, and rounded once when they go back.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from hf_stablespam.optim.cpu_sweep import Patch, clip, sweep
from hf_stablespam.optim.pieces import BUCKET, PIECE, Piece, Scratch, as_blocks, buckets, flat_view, split
from hf_stablespam.optim.plan import (
    Batch,
    Options,
    Plan,
    State,
    plan_adam,
    plan_clipping,
    stack_trackers,
    step_statistics,
    store_trackers,
)
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

    finite: list[bool]
    factor: list[float]
    carry: list[float]
    beta1: list[float]


def fused_cpu_step(batch: Batch, options: Options) -> dict[str, Tensor]:
    """One step for parameters of one dtype on the CPU, whose weight, gradient and moments share a gapless layout.

    Args:
        batch: parameters, gradients, states.
        options: the parameter group.

    Returns:
        The statistics, each a vector with one entry per parameter.
    """
    scratch = Scratch(batch.states[0]["clip_max"].dtype)
    sizes = [param.numel() for param in batch.params]
    results = [_bucket_step(batch.pick(bucket), options, scratch) for bucket in buckets(sizes, BUCKET)]
    return {name: torch.cat([result[name] for result in results]) for name in results[0]}


def _bucket_step(batch: Batch, options: Options, scratch: Scratch) -> dict[str, Tensor]:
    old = stack_trackers(batch.states)
    swept = sweep([flat_view(grad) for grad in batch.grads], scratch)
    clipping = plan_clipping(old, swept.grad_max, options)
    clipped = clip(swept, clipping, scratch)
    plan = plan_adam(old, clipping, swept.grad_norm, clipped.norm, options)
    store_trackers(batch.states, plan.trackers)
    _update(batch, swept.pieces, clipped.patches, plan, options, scratch)
    return step_statistics(swept.grad_norm, swept.grad_max, clipping, clipped.entries, clipped.norm, plan)


def _update(
    batch: Batch, pieces: list[Piece], patches: dict[int, Patch], plan: Plan, options: Options, scratch: Scratch
) -> None:
    """Send the pieces of all finite gradients through AdamW, small ones together."""
    parts = [_stored(param, state) for param, state in zip(batch.params, batch.states, strict=True)]
    numbers = Numbers(*(getattr(plan, name).tolist() for name in Numbers._fields))
    works: list[Work] = []
    filled, beta1 = 0, 0.0
    for index, (owner, part, grad, _) in enumerate(pieces):
        if not numbers.finite[owner]:
            continue
        if works and (filled + grad.numel() > PIECE or numbers.beta1[owner] != beta1):
            _adamw(works, beta1, options)
            works, filled = [], 0
        stabilized = _stabilized(grad, patches.get(index), numbers.factor[owner], scratch, filled)
        carry, moment_step = numbers.carry[owner], batch.states[owner]["moment_step"]
        works.append(_work(stabilized, parts[owner][part], moment_step, carry, scratch, filled))
        filled, beta1 = filled + grad.numel(), numbers.beta1[owner]
    _adamw(works, beta1, options)


def _stored(param: Tensor, state: State) -> list[Stored]:
    """Weight and moments, cut like the gradient."""
    tensors = (param.detach(), state["exp_avg"], state["exp_avg_sq"])
    return [Stored(*parts) for parts in zip(*(split(flat_view(tensor)) for tensor in tensors), strict=True)]


def _stabilized(grad: Tensor, patch: Patch | None, factor: float, scratch: Scratch, offset: int) -> Tensor:
    """A scratch copy of a piece of the gradient, clipped and normalised."""
    target = scratch.take("grad", grad.numel(), offset)
    if grad.dtype == target.dtype:
        torch.mul(grad, factor, out=target)
    else:  # `out=` would multiply in the gradient's dtype
        target.copy_(grad).mul_(factor)
    if patch is not None:
        as_blocks(target).index_copy_(0, patch.rows, patch.values * factor)
    return target


def _work(grad: Tensor, stored: Stored, moment_step: Tensor, carry: float, scratch: Scratch, offset: int) -> Work:
    weight, exp_avg, exp_avg_sq = (scratch.widened(role, getattr(stored, role), offset) for role in Stored._fields)
    if carry != 1:
        exp_avg.mul_(carry)
        exp_avg_sq.mul_(carry * carry)
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
