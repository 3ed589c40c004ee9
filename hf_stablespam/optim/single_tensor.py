"""One step of Stable-SPAM for one tensor, written as the paper writes it.

This path works for every device, dtype and kind of tensor, synchronises nothing and compiles. The faster paths do
the same.
"""

import torch
from torch import Tensor

from hf_stablespam.optim import low_bit
from hf_stablespam.optim.formulas import clip_spikes, safe_norm
from hf_stablespam.optim.plan import (
    Clipping,
    Options,
    Plan,
    State,
    Trackers,
    plan_adam,
    plan_clipping,
    step_statistics,
)
from hf_stablespam.optim.rounding import store


def stable_spam_step(param: Tensor, grad: Tensor, state: State, options: Options) -> dict[str, Tensor]:
    """Update a parameter and its state in place; return the statistics of the step.

    A gradient whose squared norm is not finite (``nan``, ``inf``, or beyond the range of the statistics' dtype)
    changes nothing at all.

    Args:
        param: ``w``, any shape.
        grad: ``g``, shaped like ``param``.
        state: moments, trackers and counters of the parameter.
        options: the parameter group, with the options of `StableSPAM`.

    Returns:
        0-dimensional tensors by the names of `StableSPAM.statistics`.
    """
    grad, plan, statistics = stabilized(grad, state, options)
    exp_avg, exp_avg_sq, weight = adam(param.to(grad.dtype), grad, state, plan, options)
    store_state(state, plan, exp_avg, exp_avg_sq)
    store(param, torch.where(plan.finite, weight, param), stochastic=options["stochastic_rounding"])
    return statistics


def store_state(state: State, plan: Plan, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
    """Write the new trackers and, if the gradient was finite, the new moments."""
    for name, value in plan.trackers._asdict().items():
        state[name].copy_(value)
    low_bit.write(state["exp_avg"], exp_avg, plan.finite)
    low_bit.write(state["exp_avg_sq"], exp_avg_sq, plan.finite)


def stabilized(grad: Tensor, state: State, options: Options) -> tuple[Tensor, Plan, dict[str, Tensor]]:
    """AdaClip and AdaGN: the gradient that Adam gets, the coefficients of the step, the statistics."""
    old = Trackers(*(state[name] for name in Trackers._fields))
    grad = grad.to(old.clip_max.dtype)
    if options["maximize"]:
        grad = -grad
    grad_max = grad.abs().amax()
    grad_norm = safe_norm(grad, grad_max)
    # under GaLore AdaClip's average is younger than the other trackers
    clipping = plan_clipping(old._replace(adopted_at=state.get("clip_since", old.adopted_at)), grad_max, options)
    grad, clipped, norm = _clip(grad, grad_max, grad_norm, clipping, options)
    plan = plan_adam(old, clipping, grad_norm, norm, options)
    return grad * plan.factor, plan, step_statistics(grad_norm, grad_max, clipping, clipped, norm, plan)


def _clip(
    grad: Tensor, grad_max: Tensor, grad_norm: Tensor, clipping: Clipping, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    if options["clip_beta"] is None:
        return grad, torch.zeros_like(grad_norm), grad_norm
    grad, clipped = clip_spikes(grad, clipping.threshold, clipping.ratio)
    return grad, clipped, safe_norm(grad, grad_max)


def adam(weight: Tensor, grad: Tensor, state: State, plan: Plan, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """MoRet and AdamW: the new ``M``, ``V`` and weight, in the dtype of the stabilised gradient."""
    lr, beta2 = options["lr"], options["betas"][1]
    exp_avg = plan.beta1 * (low_bit.read(state["exp_avg"], grad.dtype) * plan.carry) + (1 - plan.beta1) * grad
    old_sq = low_bit.read(state["exp_avg_sq"], grad.dtype) * plan.carry_sq
    exp_avg_sq = beta2 * old_sq + (1 - beta2) * grad.square()
    root = (exp_avg_sq / plan.correction2).sqrt() + options["eps"]
    weight = weight * (1 - lr * options["weight_decay"]) - lr * (exp_avg / plan.correction1) / root
    return exp_avg, exp_avg_sq, weight
