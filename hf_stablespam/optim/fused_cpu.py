"""The fast path on the CPU: one tensor after the other, measured, clipped and updated while it is in the cache.

* One operation reads the gradient for its largest entry, a second one for its norm, from the cache (`cpu_sweep`); with
  Numba one read gives both (`compiled_sweep`).
* The sum of squares after clipping differs only by the few entries above the threshold; the maxima of blocks of 1024
  entries say in which blocks those are, and only these blocks are rewritten, for as long as the update takes.
* AdaGN is one factor per tensor. For float32 and float64 tensors it goes into the coefficients of PyTorch's fused
  AdamW, which reads the gradient as it is and costs what AdamW costs (`cpu_direct`). For fewer bits, many spikes and
  gradients of unusual size it is multiplied into a scratch copy of a piece of the gradient (`cpu_scratch`).
* The few numbers of each tensor are Python floats here: see `numbers`.

``p.grad`` is left as it was found.
"""

import ctypes
import math
from typing import NamedTuple

import torch
from torch import Tensor

from hf_stablespam.optim.cpu_direct import direct_coefficients, direct_update, scales_to_keep
from hf_stablespam.optim.cpu_scratch import scratch_update
from hf_stablespam.optim.cpu_sweep import Limits, Spike, clip, measure, scale_spikes
from hf_stablespam.optim.pieces import Scratch, flat_view
from hf_stablespam.optim.plan import (
    Batch,
    Options,
    Plan,
    State,
    Trackers,
    as_floats,
    plan_adam,
    plan_clipping,
    step_statistics,
)

FUSED_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def fused_cpu_step(batch: Batch, options: Options) -> dict[str, Tensor]:
    """One step for parameters of one dtype on the CPU, whose weight, gradient and moments share a gapless layout.

    Args:
        batch: parameters, gradients, states.
        options: the parameter group.

    Returns:
        The statistics, each a vector with one entry per parameter.
    """
    scratch = Scratch(batch.states[0]["clip_max"].dtype)
    rows = [_step_one(*tensors, options, scratch) for tensors in zip(*batch, as_floats(batch.states), strict=True)]
    return {name: torch.tensor([row[name] for row in rows], dtype=torch.float32) for name in rows[0]}


class Seen(NamedTuple):
    """What a gradient is, and what the step does to it."""

    grad_max: float
    limits: Limits
    spikes: list[Spike] | None  # None: to be found once more
    plan: Plan
    statistics: dict[str, float]  # by the names of `StableSPAM.statistics`


def see(grad: Tensor, old: Trackers, options: Options, scratch: Scratch) -> Seen:
    """Measure a gradient, find its spikes and plan the step; nothing is changed.

    Args:
        grad: ``g``, gapless.
        old: trackers before the step.
        options: the parameter group.
        scratch: working memory.
    """
    measured = measure(flat_view(grad), scratch)
    clipping = plan_clipping(old, measured.grad_max, options)
    limits = Limits(_rounded(clipping.threshold, scratch.dtype), clipping.ratio)
    clipped = clip(measured, limits, scratch)
    grad_norm, norm = math.sqrt(measured.square), math.sqrt(clipped.square)
    plan = plan_adam(old, clipping, grad_norm, norm, options)
    statistics = step_statistics(grad_norm, measured.grad_max, clipping, clipped.entries, norm, plan)
    return Seen(measured.grad_max, limits, clipped.spikes, plan, statistics)


def _step_one(
    param: Tensor, grad: Tensor, state: State, old: Trackers, options: Options, scratch: Scratch
) -> dict[str, float]:
    """Update a tensor and its state; return the statistics."""
    grad_max, limits, spikes, plan, statistics = see(grad, old, options, scratch)
    if plan.finite:
        in_full = param.dtype == state["exp_avg"].dtype == scratch.dtype
        coefficients = direct_coefficients(grad_max, plan, options) if in_full else None
        if coefficients is not None and spikes is not None:
            _store(state, old, plan.trackers._replace(**scales_to_keep(param, coefficients)))
            try:
                scale_spikes(spikes, limits.ratio)
                direct_update(param, grad, state, coefficients, plan, options)
            finally:
                scale_spikes(spikes, 1)
        else:
            _store(state, old, plan.trackers)
            scratch_update(param, grad, state, spikes, limits, plan, options, scratch)
    return statistics


def _store(state: State, old: Trackers, new: Trackers) -> None:
    """Write the trackers that changed."""
    for name, before, after in zip(Trackers._fields, old, new, strict=True):
        if after != before:
            state[name].fill_(after)


def _rounded(value: float, dtype: torch.dtype) -> float:
    """The number that a tensor of this dtype compares with when it is told to compare with this one."""
    return ctypes.c_float(value).value if dtype == torch.float32 else value
