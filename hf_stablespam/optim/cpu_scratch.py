"""PyTorch's fused AdamW on stabilised copies of pieces of the gradient.

For tensors that `cpu_direct` does not take. Parameters or moments of fewer bits are widened to float32 piece by
piece, and rounded once when they go back.
"""

import torch
from torch import Tensor

from hf_stablespam.optim.cpu_sweep import Limits, Spike, clip_copy
from hf_stablespam.optim.pieces import PIECE, Scratch, cut, flat_view
from hf_stablespam.optim.plan import Options, Plan, State
from hf_stablespam.optim.rounding import store


def scratch_update(
    param: Tensor,
    grad: Tensor,
    state: State,
    spikes: list[Spike] | None,
    limits: Limits,
    plan: Plan,
    options: Options,
    scratch: Scratch,
) -> None:
    """Update one tensor; its gradient is not changed.

    Args:
        param: ``w``.
        grad: ``g``, not clipped.
        state: with the moments; the counters are already this step's.
        spikes: what is to be clipped, or ``None`` where it has to be found once more.
        limits: threshold and ratio.
        plan: this step's plan.
        options: the parameter group.
        scratch: working memory.
    """
    factor = min(plan.factor, scratch.largest)
    start = 0
    tensors = (grad, param.detach(), state["exp_avg"], state["exp_avg_sq"])
    for piece, *stored in zip(*(cut(flat_view(tensor), PIECE) for tensor in tensors), strict=True):
        work = scratch.copied("grad", piece)
        clip_copy(work, start, spikes, limits)
        roles = ("weight", "exp_avg", "exp_avg_sq")
        weight, exp_avg, exp_avg_sq = (scratch.widened(*pair) for pair in zip(roles, stored, strict=True))
        if (plan.carry, plan.carry_sq) != (1, 1):
            exp_avg.mul_(plan.carry)
            exp_avg_sq.mul_(plan.carry_sq)
        _adamw(weight, work.mul_(factor), exp_avg, exp_avg_sq, state["moment_step"], plan.beta1, options)
        if stored[0] is not weight:
            store(stored[0], weight, stochastic=options["stochastic_rounding"])
        if stored[1] is not exp_avg:
            stored[1].copy_(exp_avg)
            stored[2].copy_(exp_avg_sq)
        start += piece.numel()


def _adamw(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    moment_step: Tensor,
    beta1: float,
    options: Options,
) -> None:
    torch._fused_adamw_(
        [weight],
        [grad],
        [exp_avg],
        [exp_avg_sq],
        [],
        [moment_step],
        lr=float(options["lr"]),
        beta1=beta1,
        beta2=options["betas"][1],
        weight_decay=options["weight_decay"],
        eps=options["eps"],
        amsgrad=False,
        maximize=options["maximize"],
    )
