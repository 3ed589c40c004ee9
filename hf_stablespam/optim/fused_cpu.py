"""The fast path on the CPU: one sweep over the gradients for maxima and norms, one through PyTorch's fused AdamW.

* Gradients are measured in pieces: the maximum of each block of 1024 entries, and the sum of squares of the piece
  while it is still in the cache (`cpu_sweep`).
* The sum of squares after clipping differs only by the few entries above the threshold; the maxima of the blocks say
  in which blocks those are, and only these blocks are read again.
* AdaGN is one factor per tensor. For large float32 and float64 tensors it goes into the coefficients of AdamW, so that
  the update reads the gradient as it is and costs what AdamW costs (`cpu_direct`). For small tensors, fewer bits and
  gradients of unusual size it is multiplied into a scratch copy of a piece of the gradient (`cpu_scratch`).

``p.grad`` is left as it was found.
"""

import torch
from torch import Tensor

from hf_stablespam.optim.cpu_direct import direct_numbers, direct_update
from hf_stablespam.optim.cpu_scratch import scratch_update
from hf_stablespam.optim.cpu_sweep import clip, sweep
from hf_stablespam.optim.pieces import Scratch, flat_view
from hf_stablespam.optim.plan import (
    Batch,
    Options,
    plan_adam,
    plan_clipping,
    stack_trackers,
    step_statistics,
    store_trackers,
)


def fused_cpu_step(batch: Batch, options: Options) -> dict[str, Tensor]:
    """One step for parameters of one dtype on the CPU, whose weight, gradient and moments share a gapless layout.

    Args:
        batch: parameters, gradients, states.
        options: the parameter group.

    Returns:
        The statistics, each a vector with one entry per parameter.
    """
    scratch = Scratch(batch.states[0]["clip_max"].dtype)
    old = stack_trackers(batch.states)
    swept = sweep([flat_view(grad) for grad in batch.grads], scratch)
    clipping = plan_clipping(old, swept.grad_max, options)
    clipped = clip(swept, clipping, scratch)
    plan = plan_adam(old, clipping, swept.grad_norm, clipped.norm, options)

    numbers = direct_numbers(batch, swept.grad_max, plan, options)
    scales = {
        "exp_avg_scale": torch.where(numbers.fits, numbers.scale, plan.trackers.exp_avg_scale),
        "exp_avg_sq_scale": torch.where(numbers.fits, numbers.scale_sq, plan.trackers.exp_avg_sq_scale),
    }
    store_trackers(batch.states, plan.trackers._replace(**scales))
    direct_update(batch, swept.pieces, clipped.patches, numbers, plan, options)
    in_pieces = (plan.finite & ~numbers.fits).tolist()
    pieces = {index: piece for index, piece in enumerate(swept.pieces) if in_pieces[piece.owner]}
    scratch_update(batch, pieces, clipped.patches, plan, options, scratch)
    return step_statistics(swept.grad_norm, swept.grad_max, clipping, clipped.entries, clipped.norm, plan)
