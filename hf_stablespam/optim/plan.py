"""What one step does to the few numbers kept for each tensor, and with which coefficients the gradients are updated.

Every backend asks here, so the method is decided once. Vectors have one entry per tensor, in the dtype of the
statistics: float32, or float64 for float64 parameters.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_stablespam.optim.formulas import (
    Coefficients,
    adam_sizes,
    clip_ratio,
    clip_threshold,
    cosine_decay,
    is_reset_step,
    is_usable,
    norm_factor,
    norm_target,
)

State = dict[str, Tensor]
Options = dict[str, Any]
MOMENTS = ("exp_avg", "exp_avg_sq")  # M and V


class Batch(NamedTuple):
    """Parameters that are updated together."""

    params: list[Tensor]  # w
    grads: list[Tensor]  # g, dense, never changed
    states: list[State]

    @classmethod
    def of(cls, params: Iterable[Tensor], states: Any, fresh: Callable[[Tensor], State]) -> "Batch":
        """The parameters that have a gradient, with their states, which begin to exist here."""
        chosen = [param for param in params if param.grad is not None and param.numel() > 0]
        for param in chosen:
            if not states.get(param):
                states[param] = fresh(param)
        return cls(chosen, [param.grad for param in chosen], [states[param] for param in chosen])  # type: ignore[misc]

    def pick(self, indices: list[int]) -> "Batch":
        """Some of them."""
        return Batch(*([column[index] for index in indices] for column in self))  # type: ignore[arg-type]


class Result(NamedTuple):
    """Statistics of some parameters, each a vector with one entry per parameter."""

    params: list[Tensor]
    statistics: dict[str, Tensor]


class Trackers(NamedTuple):
    """The small state of many tensors, under its names in `StableSPAM.state`."""

    step: Tensor  # t, gradients seen
    moment_step: Tensor  # k, gradients since the moments were reset
    clip_max: Tensor  # T
    norm_mean: Tensor  # m
    norm_sq: Tensor  # v
    adopted_at: Tensor  # t at which the trackers began; 0 unless the moments came from another optimizer
    clip_since: Tensor  # t at which AdaClip's average began: adopted_at, but under GaLore at the last new directions


CHANGING = Trackers._fields[:5]


class Measured(NamedTuple):
    """Gradients as they came."""

    grad_max: Tensor  # max|g|, nan if an entry is
    norm: Tensor  # ‖g‖


class Clipping(NamedTuple):
    """AdaClip for this step."""

    clip_max: Tensor  # the new T
    threshold: Tensor  # T̂; inf when clipping is off
    ratio: Tensor  # T̂/gmax


class Clipped(NamedTuple):
    """Gradients after clipping."""

    norm: Tensor
    entries: Tensor  # how many were clipped


class Plan(NamedTuple):
    """This step's new trackers and what it does to the tensors."""

    trackers: Tensor  # (5, tensors), those that are `CHANGING`; the old ones where the tensor is passed over
    finite: Tensor  # bool: False where the tensor is passed over, and `by` means nothing
    factor: Tensor  # f, by which the clipped gradient is multiplied
    reset: Tensor  # bool
    by: Coefficients


def plan_clipping(old: Trackers, grad_max: Tensor, options: Options) -> Clipping:
    """The threshold of this step, from the running mean of the largest entries."""
    if options["clip_beta"] is None:
        return Clipping(old.clip_max, torch.full_like(grad_max, torch.inf), torch.ones_like(grad_max))
    age = old.step + 1 - old.clip_since  # gradients in the mean, this one included
    clip_max, threshold = clip_threshold(old.clip_max, grad_max, age, clip_beta=options["clip_beta"])
    return Clipping(clip_max, threshold, clip_ratio(grad_max, threshold))


def plan_update(old: Trackers, clipping: Clipping, measured: Measured, clipped: Clipped, options: Options) -> Plan:
    """The rest of the step: AdaGN's factor, the reset, the decayed β1, the bias corrections, the new trackers."""
    finite, norm, step = is_usable(measured.norm), clipped.norm, old.step + 1
    decay = cosine_decay(step, options["decay_steps"], options["decay_floor"])
    norm_mean, norm_sq, factor = old.norm_mean, old.norm_sq, torch.ones_like(norm)
    if options["norm_betas"] is not None:
        age, betas = step - old.adopted_at, options["norm_betas"]
        norm_mean, norm_sq, target = norm_target(
            norm_mean, norm_sq, norm, age, norm_betas=betas, decay=decay, eps=options["eps"]
        )
        factor = norm_factor(target, norm)
    reset = is_reset_step(step, options["reset_interval"]) & finite
    moment_step = torch.where(reset, 0, old.moment_step) + 1
    new = torch.stack([step, moment_step, clipping.clip_max, norm_mean, norm_sq])
    return Plan(
        trackers=torch.where(finite, new, torch.stack(old[:5])),
        finite=finite,
        factor=torch.where(finite, factor, 0),
        reset=reset,
        by=_coefficients(old, clipping, factor, moment_step, decay, options),
    )


def _coefficients(
    old: Trackers, clipping: Clipping, factor: Tensor, moment_step: Tensor, decay: Tensor | float, options: Options
) -> Coefficients:
    (beta1, beta2), lr, ones = options["betas"], options["lr"], torch.ones_like(factor)
    beta1 = decay * beta1 * ones
    carry = _carry(old, factor, moment_step)
    size, eps = adam_sizes(lr, (beta1, beta2), moment_step, options["eps"])
    return Coefficients(
        threshold=clipping.threshold,
        ratio=clipping.ratio,
        factor=-factor if options["maximize"] else factor,
        keep=beta1 * carry,
        enter=1 - beta1,
        keep_sq=beta2 * carry * carry,
        enter_sq=(1 - beta2) * ones,
        size=size,
        decay=(1 - lr * options["weight_decay"]) * ones,
        eps=eps,
    )


def _carry(old: Trackers, factor: Tensor, moment_step: Tensor) -> Tensor:
    """How the old moments enter this step: not at all if it is their first; as they are otherwise, with one exception.

    Moments adopted from AdamW are in the scale of the raw gradient. The first gradient that AdaGN normalises, one that
    is not zero, tells the factor between the two scales; ``M·f`` and ``V·f²`` are what normalising would have made of
    them. Until then all trackers are zero.
    """
    first = (old.adopted_at > 0) & (old.clip_max + old.norm_mean + old.norm_sq == 0) & (factor > 0)
    return torch.where(moment_step == 1, 0.0, torch.where(first, factor, 1.0))


def step_statistics(measured: Measured, clipping: Clipping, clipped: Clipped, plan: Plan) -> dict[str, Tensor]:
    """The step by the names of `StableSPAM.statistics`, in float32."""
    rows = {
        "grad_norm": measured.norm,
        "grad_max": measured.grad_max,
        "clip_threshold": clipping.threshold,
        "clipped": clipped.entries,
        "norm_factor": plan.factor,
        "stable_norm": clipped.norm * plan.factor,
        "nonfinite": ~plan.finite,
        "reset": plan.reset,
    }
    return {name: value.to(torch.float32) for name, value in rows.items()}
