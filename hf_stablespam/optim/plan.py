"""What one step does to the few numbers kept for each tensor, and with which coefficients Adam runs.

Every path of `StableSPAM` (loop, foreach, fused) asks here, so the method is written once. All functions take
0-dimensional tensors or Python floats (one parameter) and vectors (one entry per parameter) alike.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_stablespam.optim.formulas import bias_correction, clip_ratio, clip_threshold, norm_factor, norm_target
from hf_stablespam.optim.numbers import Number, as_type_of, constant, isfinite, where
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

    step: Number  # t, gradients seen
    moment_step: Number  # k, gradients since the moments were reset
    adopted_at: Number  # t at which the trackers began; 0 unless the moments came from another optimizer
    clip_max: Number  # T
    norm_mean: Number  # m
    norm_sq: Number  # v
    exp_avg_scale: Number  # M is exp_avg times this: 1, except where `cpu_direct` found a multiplication to save
    exp_avg_sq_scale: Number  # V is exp_avg_sq times this


class Clipping(NamedTuple):
    """AdaClip for this step."""

    clip_max: Number  # the new T
    threshold: Number  # T̂; inf when clipping is off
    ratio: Number  # T̂/gmax


class Plan(NamedTuple):
    """This step's new trackers and the coefficients of Adam."""

    trackers: Trackers
    finite: Number  # bool: False where the tensor is passed over, and the trackers are the old ones
    factor: Number  # f, by which the clipped gradient is multiplied
    reset: Number  # bool
    carry: Number  # M before the step is exp_avg times this: 0 after a reset, and see `_carry`
    carry_sq: Number  # V before the step is exp_avg_sq times this
    beta1: Number  # sβ1
    correction1: Number  # 1 − (sβ1)ᵏ
    correction2: Number  # 1 − β2ᵏ


def stack_trackers(states: list[State]) -> Trackers:
    """The trackers of many tensors as vectors."""
    return Trackers(*(torch.stack([state[name] for state in states]) for name in Trackers._fields))


def as_floats(states: list[State]) -> list[Trackers]:
    """The trackers of each of many tensors, as Python floats."""
    return [Trackers(*(state[name].item() for name in Trackers._fields)) for state in states]


def store_trackers(states: list[State], trackers: Trackers) -> None:
    """Write vectors of trackers back, in one multi-tensor copy."""
    targets = [state[name] for name in Trackers._fields for state in states]
    torch._foreach_copy_(targets, [value for column in trackers for value in column.unbind()])


def plan_clipping(old: Trackers, grad_max: Number, options: Options) -> Clipping:
    """The threshold of this step, from the running mean of the largest entries.

    Args:
        old: trackers before the step.
        grad_max: ``max|g|``.
        options: the parameter group.
    """
    if options["clip_beta"] is None:
        return Clipping(old.clip_max, constant(math.inf, grad_max), constant(1, grad_max))
    age = as_type_of(_age(old), grad_max)
    clip_max, threshold = clip_threshold(old.clip_max, grad_max, age, clip_beta=options["clip_beta"])
    return Clipping(clip_max, threshold, clip_ratio(grad_max, threshold))


def plan_adam(old: Trackers, clipping: Clipping, grad_norm: Number, norm: Number, options: Options) -> Plan:
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
    decay = cosine_decay(as_type_of(step, norm), options["decay_steps"], options["decay_floor"])
    norm_mean, norm_sq, factor = _normalise(old, norm, decay, options)
    reset = is_reset_step(step, options["reset_interval"]) & finite
    moment_step = where(reset, 0, old.moment_step) + 1
    carry, one = _carry(old, factor, moment_step, finite), constant(1, norm)
    new = Trackers(step, moment_step, old.adopted_at, clipping.clip_max, norm_mean, norm_sq, one, one)
    beta1, k = decay * options["betas"][0] * one, as_type_of(moment_step, norm)
    return Plan(
        trackers=_choose(finite, new, old),
        finite=finite,
        factor=where(finite, factor, 0),
        reset=reset,
        carry=carry * old.exp_avg_scale,
        carry_sq=carry * carry * old.exp_avg_sq_scale,
        beta1=beta1,
        correction1=bias_correction(beta1, k),
        correction2=bias_correction(options["betas"][1], k),
    )


def is_usable(grad_norm: Number) -> Number:
    """Whether a gradient may enter any state: its squared norm is finite in the dtype of the statistics."""
    return isfinite(grad_norm * grad_norm)


def is_reset_step(step: Number, reset_interval: int | None) -> Number:
    """Whether MoRet empties the moments at step ``t = 1, 2, …``: every ``ΔT`` steps."""
    return step < 0 if reset_interval is None else step % reset_interval == 0


def step_statistics(
    grad_norm: Number, grad_max: Number, clipping: Clipping, clipped: Number, norm: Number, plan: Plan
) -> dict[str, Number]:
    """The step by the names of `StableSPAM.statistics`; tensors in float32."""
    rows = {
        "grad_norm": grad_norm,
        "grad_max": grad_max,
        "clip_threshold": clipping.threshold,
        "clipped": clipped,
        "norm_factor": plan.factor,
        "stable_norm": norm * plan.factor,
        "nonfinite": where(plan.finite, 0, 1),
        "reset": plan.reset,
    }
    return {name: value.to(torch.float32) if isinstance(value, Tensor) else value for name, value in rows.items()}


def _choose(condition: Number, yes: Trackers, no: Trackers) -> Trackers:
    if isinstance(condition, Tensor):
        return Trackers(*(torch.where(condition, after, before) for after, before in zip(yes, no, strict=True)))
    return yes if condition else no


def _age(old: Trackers) -> Number:
    """Gradients that the trackers have seen, this step's included: by it they are debiased."""
    return old.step + 1 - old.adopted_at


def _normalise(old: Trackers, norm: Number, decay: Number, options: Options) -> tuple[Number, Number, Number]:
    """AdaGN: the new ``m`` and ``v``, and the factor ``c/n``."""
    if options["norm_betas"] is None:
        return old.norm_mean, old.norm_sq, constant(1, norm)
    norm_mean, norm_sq, target = norm_target(
        old.norm_mean,
        old.norm_sq,
        norm,
        as_type_of(_age(old), norm),
        norm_betas=options["norm_betas"],
        decay=decay,
        eps=options["eps"],
    )
    return norm_mean, norm_sq, norm_factor(target, norm)


def _carry(old: Trackers, factor: Number, moment_step: Number, finite: Number) -> Number:
    """How the old moments enter this step: not at all if it is their first; as they are otherwise, with one exception.

    Moments adopted from AdamW are in the scale of the raw gradient. The first gradient that AdaGN normalises tells
    the factor between the two scales; ``M·f`` and ``V·f²`` are what normalising would have made of them.
    """
    first = (old.adopted_at > 0) & (old.step == old.adopted_at) & finite & (factor > 0)
    return where(moment_step == 1, 0, where(first, factor, 1))
