"""What one step does to the few numbers kept for each tensor, and with which coefficients Adam runs.

Every path of `StableSPAM` (loop, foreach, fused) asks here, so the method is written once. All functions take
0-dimensional tensors (one parameter) and vectors (one entry per parameter) alike.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_stablespam.optim.formulas import bias_correction, clip_ratio, clip_threshold, norm_factor, norm_target
from hf_stablespam.optim.schedule import cosine_decay

State = dict[str, Tensor]
Options = dict[str, Any]


class Batch(NamedTuple):
    """Parameters that are updated together."""

    params: list[Tensor]  # w
    grads: list[Tensor]  # g, dense, never changed
    states: list[State]

    def pick(self, indices: Iterable[int]) -> "Batch":
        """Some of them."""
        chosen = [(self.params[index], self.grads[index], self.states[index]) for index in indices]
        params, grads, states = (list(column) for column in zip(*chosen, strict=True))
        return Batch(params, grads, states)


class Result(NamedTuple):
    """Statistics of some parameters, each a vector with one entry per parameter."""

    params: list[Tensor]
    statistics: dict[str, Tensor]


class Trackers(NamedTuple):
    """The small state of a tensor (or of many, stacked), under its names in `StableSPAM.state`."""

    step: Tensor  # t, gradients seen
    moment_step: Tensor  # k, gradients since the moments were reset
    adopted_at: Tensor  # t at which the trackers began; 0 unless the moments came from another optimizer
    clip_max: Tensor  # T
    norm_mean: Tensor  # m
    norm_sq: Tensor  # v
    exp_avg_scale: Tensor  # M is exp_avg times this: 1, except where `cpu_direct` found a multiplication to save
    exp_avg_sq_scale: Tensor  # V is exp_avg_sq times this


class Clipping(NamedTuple):
    """AdaClip for this step."""

    clip_max: Tensor  # the new T
    threshold: Tensor  # T̂; inf when clipping is off
    ratio: Tensor  # T̂/gmax


class Plan(NamedTuple):
    """This step's new trackers and the coefficients of Adam."""

    trackers: Trackers
    finite: Tensor  # bool: False where the tensor is passed over, and the trackers are the old ones
    factor: Tensor  # f, by which the clipped gradient is multiplied
    reset: Tensor  # bool
    carry: Tensor  # M before the step is exp_avg times this: 0 at a reset, and see `_carry`
    carry_sq: Tensor  # V before the step is exp_avg_sq times this
    beta1: Tensor  # sβ1
    correction1: Tensor  # 1 − (sβ1)ᵏ
    correction2: Tensor  # 1 − β2ᵏ


def stack_trackers(states: list[State]) -> Trackers:
    """The trackers of many tensors as vectors."""
    return Trackers(*(torch.stack([state[name] for state in states]) for name in Trackers._fields))


def store_trackers(states: list[State], trackers: Trackers) -> None:
    """Write vectors of trackers back, in one multi-tensor copy."""
    targets = [state[name] for name in Trackers._fields for state in states]
    torch._foreach_copy_(targets, [value for column in trackers for value in column.unbind()])


def plan_clipping(old: Trackers, grad_max: Tensor, options: Options) -> Clipping:
    """The threshold of this step, from the running mean of the largest entries.

    Args:
        old: trackers before the step.
        grad_max: ``max|g|``.
        options: the parameter group.
    """
    if options["clip_beta"] is None:
        return Clipping(old.clip_max, torch.full_like(grad_max, torch.inf), torch.ones_like(grad_max))
    age = _age(old).to(grad_max.dtype)
    clip_max, threshold = clip_threshold(old.clip_max, grad_max, age, clip_beta=options["clip_beta"])
    return Clipping(clip_max, threshold, clip_ratio(grad_max, threshold))


def plan_adam(old: Trackers, clipping: Clipping, grad_norm: Tensor, norm: Tensor, options: Options) -> Plan:
    """The rest of the step: AdaGN's factor, the reset, the decayed β1, the bias corrections, the new trackers.

    Args:
        old: trackers before the step.
        clipping: from `plan_clipping`.
        grad_norm: ``‖g‖`` as the gradient came.
        norm: ``‖g‖`` after clipping.
        options: the parameter group.
    """
    finite = is_usable(grad_norm)
    step = old.step + 1
    decay = cosine_decay(step.to(norm.dtype), options["decay_steps"], options["decay_floor"])
    norm_mean, norm_sq, factor = _normalise(old, norm, decay, options)
    reset = is_reset_step(step, options["reset_interval"]) & finite
    moment_step = torch.where(reset, 0, old.moment_step) + 1
    carry, one = _carry(old, factor, reset, finite), torch.ones_like(norm)
    new = Trackers(step, moment_step, old.adopted_at, clipping.clip_max, norm_mean, norm_sq, one, one)
    beta1, k = decay * options["betas"][0] * one, moment_step.to(norm.dtype)
    return Plan(
        trackers=Trackers(*(torch.where(finite, after, before) for after, before in zip(new, old, strict=True))),
        finite=finite,
        factor=torch.where(finite, factor, 0),
        reset=reset,
        carry=carry * old.exp_avg_scale,
        carry_sq=carry.square() * old.exp_avg_sq_scale,
        beta1=beta1,
        correction1=bias_correction(beta1, k),
        correction2=bias_correction(options["betas"][1], k),
    )


def is_usable(grad_norm: Tensor) -> Tensor:
    """Whether a gradient may enter any state: its squared norm is finite in the dtype of the statistics."""
    return grad_norm.square().isfinite()


def is_reset_step(step: Tensor, reset_interval: int | None) -> Tensor:
    """Whether MoRet empties the moments at step ``t``: every ``ΔT`` steps."""
    if reset_interval is None:
        return torch.zeros_like(step, dtype=torch.bool)
    return step % reset_interval == 0


def step_statistics(
    grad_norm: Tensor, grad_max: Tensor, clipping: Clipping, clipped: Tensor, norm: Tensor, plan: Plan
) -> dict[str, Tensor]:
    """The step by the names of `StableSPAM.statistics`, in float32."""
    rows = {
        "grad_norm": grad_norm,
        "grad_max": grad_max,
        "clip_threshold": clipping.threshold,
        "clipped": clipped,
        "norm_factor": plan.factor,
        "stable_norm": norm * plan.factor,
        "nonfinite": ~plan.finite,
        "reset": plan.reset,
    }
    return {name: value.to(torch.float32) for name, value in rows.items()}


def _age(old: Trackers) -> Tensor:
    """Gradients that the trackers have seen, this step's included: by it they are debiased."""
    return old.step + 1 - old.adopted_at


def _normalise(old: Trackers, norm: Tensor, decay: Tensor | float, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """AdaGN: the new ``m`` and ``v``, and the factor ``c/n``."""
    if options["norm_betas"] is None:
        return old.norm_mean, old.norm_sq, torch.ones_like(norm)
    norm_mean, norm_sq, target = norm_target(
        old.norm_mean,
        old.norm_sq,
        norm,
        _age(old).to(norm.dtype),
        norm_betas=options["norm_betas"],
        decay=decay,
        eps=options["eps"],
    )
    return norm_mean, norm_sq, norm_factor(target, norm)


def _carry(old: Trackers, factor: Tensor, reset: Tensor, finite: Tensor) -> Tensor:
    """How the old moments enter this step: not at all at a reset; as they are otherwise, with one exception.

    Moments adopted from AdamW are in the scale of the raw gradient. The first gradient that AdaGN normalises tells
    the factor between the two scales; ``M·f`` and ``V·f²`` are what normalising would have made of them.
    """
    first = (old.adopted_at > 0) & (old.step == old.adopted_at) & finite & (factor > 0)
    return torch.where(reset, 0, torch.where(first, factor, 1))
