"""One step for many tensors at once with PyTorch's multi-tensor (``foreach``) operations, on any device.

Tensors are taken in buckets that together are no larger than the largest tensor, so no temporary is either.
Nothing is read back to the host: a tensor that is passed over runs through the same operations with coefficients
that leave it as it was.
"""

import torch
from torch import Tensor

from hf_stablespam.optim.formulas import clip_spikes
from hf_stablespam.optim.pieces import buckets
from hf_stablespam.optim.plan import (
    Batch,
    Clipping,
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


def foreach_step(batch: Batch, options: Options) -> dict[str, Tensor]:
    """One step for parameters of one device and dtype.

    Args:
        batch: parameters, gradients, states.
        options: the parameter group.

    Returns:
        The statistics, each a vector with one entry per parameter.
    """
    sizes = [param.numel() for param in batch.params]
    results = [_bucket_step(batch.pick(bucket), options) for bucket in buckets(sizes, max(sizes))]
    return {name: torch.cat([result[name] for result in results]) for name in results[0]}


def _bucket_step(batch: Batch, options: Options) -> dict[str, Tensor]:
    old = stack_trackers(batch.states)
    work = working_copies(batch.grads, old.clip_max.dtype, options)
    grad_max = maxima(work)
    grad_norm = norms(work, grad_max)
    clipping = plan_clipping(old, grad_max, options)
    work, clipped, norm = clip(work, grad_max, grad_norm, clipping, options)
    plan = plan_adam(old, clipping, grad_norm, norm, options)
    store_trackers(batch.states, plan.trackers)
    update(batch, work, plan, options)
    return step_statistics(grad_norm, grad_max, clipping, clipped, norm, plan)


def working_copies(grads: list[Tensor], dtype: torch.dtype, options: Options) -> list[Tensor]:
    """Gradients in the dtype of the statistics, to be changed at will, in the direction of descent."""
    work = [grad.to(dtype, copy=True) for grad in grads]
    if options["maximize"]:
        torch._foreach_neg_(work)
    return work


def maxima(work: list[Tensor]) -> Tensor:
    """``max|g|`` of each tensor."""
    return torch.stack(torch._foreach_max(torch._foreach_abs(work)))


def norms(work: list[Tensor], grad_max: Tensor) -> Tensor:
    """`safe_norm` of each tensor."""
    scale = torch.where(grad_max > 0, grad_max, 1)
    return scale * torch.stack(torch._foreach_norm(torch._foreach_div(work, scale.unbind())))


def clip(
    work: list[Tensor], grad_max: Tensor, grad_norm: Tensor, clipping: Clipping, options: Options
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The clipped gradients, how many entries were clipped in each, and their norms."""
    if options["clip_beta"] is None:
        return work, torch.zeros_like(grad_norm), grad_norm
    limits = zip(work, clipping.threshold.unbind(), clipping.ratio.unbind(), strict=True)
    clipped = [clip_spikes(*limit) for limit in limits]
    work = [grad for grad, _ in clipped]
    return work, torch.stack([count for _, count in clipped]), norms(work, grad_max)


def update(batch: Batch, work: list[Tensor], plan: Plan, options: Options) -> None:
    """AdaGN's factor, MoRet and AdamW, on the clipped gradients."""
    for grad in work:
        grad.nan_to_num_(0, 0, 0)  # a tensor that is passed over; its factor is 0
    torch._foreach_mul_(work, plan.factor.unbind())
    _adam(batch.params, work, batch.states, plan, options)


def _adam(params: list[Tensor], grads: list[Tensor], states: list[State], plan: Plan, options: Options) -> None:
    """MoRet and AdamW; tensors that are passed over are multiplied by 1 and get 0 added."""
    dtype, beta2, lr = plan.factor.dtype, options["betas"][1], options["lr"]
    exp_avgs, exp_avg_sqs = ([state[name].to(dtype) for state in states] for name in ("exp_avg", "exp_avg_sq"))
    ones = torch.ones_like(plan.factor)

    def unless_passed_over(value: Tensor | float, neutral: float) -> tuple[Tensor, ...]:
        return torch.where(plan.finite, value * ones, neutral).unbind()

    torch._foreach_mul_(exp_avgs, unless_passed_over(plan.beta1 * plan.carry, 1))
    torch._foreach_add_(exp_avgs, torch._foreach_mul(grads, unless_passed_over(1 - plan.beta1, 0)))
    torch._foreach_mul_(exp_avg_sqs, unless_passed_over(beta2 * plan.carry_sq, 1))
    squares = torch._foreach_mul(grads, grads)
    torch._foreach_mul_(squares, unless_passed_over(1 - beta2, 0))
    torch._foreach_add_(exp_avg_sqs, squares)

    roots = torch._foreach_div(exp_avg_sqs, plan.correction2.unbind())
    torch._foreach_sqrt_(roots)
    torch._foreach_add_(roots, unless_passed_over(options["eps"], 1))
    updates = torch._foreach_div(exp_avgs, plan.correction1.unbind())
    torch._foreach_div_(updates, roots)
    torch._foreach_mul_(updates, unless_passed_over(lr, 0))
    weights = [param.to(dtype) for param in params]
    torch._foreach_mul_(weights, unless_passed_over(1 - lr * options["weight_decay"], 1))
    torch._foreach_sub_(weights, updates)
    _store(params, weights, states, exp_avgs, exp_avg_sqs, options)


def _store(
    params: list[Tensor],
    weights: list[Tensor],
    states: list[State],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    options: Options,
) -> None:
    """Round what was widened back into its storage; what was not is there already."""
    for param, weight, state, exp_avg, exp_avg_sq in zip(params, weights, states, exp_avgs, exp_avg_sqs, strict=True):
        if weight is not param:
            store(param, weight, stochastic=options["stochastic_rounding"])
        if exp_avg is not state["exp_avg"]:
            state["exp_avg"].copy_(exp_avg)
            state["exp_avg_sq"].copy_(exp_avg_sq)
