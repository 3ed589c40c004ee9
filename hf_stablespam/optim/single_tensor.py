"""One step of Stable-SPAM for one tensor, written as the paper writes it.

This path works for every device and dtype, synchronises nothing and compiles. The faster paths do the same.
"""

from typing import Any

import torch
from torch import Tensor

from hf_stablespam.optim.formulas import (
    bias_correction,
    clip_ratio,
    clip_spikes,
    clip_threshold,
    norm_factor,
    norm_target,
    safe_norm,
)
from hf_stablespam.optim.schedule import cosine_decay

State = dict[str, Tensor]
Options = dict[str, Any]


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
    grad, trackers, statistics = stabilized(grad, state, options)
    moments, weight = _adam(param.to(grad.dtype), grad, state, options, statistics)
    finite = statistics["nonfinite"] == 0
    for name, value in {**trackers, **moments}.items():
        state[name].copy_(torch.where(finite, value.to(state[name].dtype), state[name]))
    param.copy_(torch.where(finite, weight.to(param.dtype), param))
    return statistics


def stabilized(grad: Tensor, state: State, options: Options) -> tuple[Tensor, State, dict[str, Tensor]]:
    """AdaClip and AdaGN: the gradient that Adam gets, the new trackers with their counter, the statistics."""
    grad = grad.to(state["clip_max"].dtype)
    if options["maximize"]:
        grad = -grad
    trackers: State = {"step": state["step"] + 1}
    step = trackers["step"].to(grad.dtype)
    grad_max = grad.abs().amax()
    norm = grad_norm = safe_norm(grad, grad_max)
    threshold, factor = torch.full_like(grad_max, torch.inf), torch.ones_like(grad_max)
    clipped = torch.zeros_like(grad_max)

    if options["clip_beta"] is not None:
        trackers["clip_max"], threshold = clip_threshold(
            state["clip_max"], grad_max, step, clip_beta=options["clip_beta"]
        )
        grad, clipped = clip_spikes(grad, threshold, clip_ratio(grad_max, threshold))
        norm = safe_norm(grad, grad_max)

    if options["norm_betas"] is not None:
        trackers["norm_mean"], trackers["norm_sq"], target = norm_target(
            state["norm_mean"],
            state["norm_sq"],
            norm,
            step,
            norm_betas=options["norm_betas"],
            decay=cosine_decay(step, options["decay_steps"], options["decay_floor"]),
            eps=options["eps"],
        )
        factor = norm_factor(target, norm)
        grad = grad * factor

    statistics = {
        "grad_norm": grad_norm,
        "grad_max": grad_max,
        "clip_threshold": threshold,
        "clipped": clipped.to(norm.dtype),
        "norm_factor": factor,
        "stable_norm": norm * factor,
        "nonfinite": (~grad_norm.square().isfinite()).to(norm.dtype),
        "reset": torch.zeros_like(norm),
    }
    return grad, trackers, statistics


def _adam(
    weight: Tensor, grad: Tensor, state: State, options: Options, statistics: dict[str, Tensor]
) -> tuple[State, Tensor]:
    """MoRet and AdamW: the new moments with their counter, and the new weight."""
    lr, (beta1, beta2) = options["lr"], options["betas"]
    step = state["step"] + 1
    beta1 = cosine_decay(step.to(grad.dtype), options["decay_steps"], options["decay_floor"]) * beta1
    exp_avg, exp_avg_sq = state["exp_avg"].to(grad.dtype), state["exp_avg_sq"].to(grad.dtype)
    moment_step = state["moment_step"]
    if options["reset_interval"] is not None:
        reset = step % options["reset_interval"] == 0
        exp_avg, exp_avg_sq, moment_step = (t.masked_fill(reset, 0) for t in (exp_avg, exp_avg_sq, moment_step))
        statistics["reset"] = reset.to(grad.dtype) * (1 - statistics["nonfinite"])

    moment_step = moment_step + 1
    k = moment_step.to(grad.dtype)
    exp_avg = beta1 * exp_avg + (1 - beta1) * grad
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad.square()
    root = (exp_avg_sq / bias_correction(beta2, k)).sqrt() + options["eps"]
    weight = weight * (1 - lr * options["weight_decay"]) - lr * (exp_avg / bias_correction(beta1, k)) / root
    return {"moment_step": moment_step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}, weight
