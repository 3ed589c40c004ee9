r"""PyTorch's fused AdamW on the gradient as it is, with AdaGN's factor in the coefficients.

The update wants ``M ← β1·M + (1−β1)·f·g``, and AdamW computes ``E ← b·E + (1−b)·g``. So ``E`` is kept with a scale:
``M = a·E``. With ``a' = β1·a + (1−β1)·f`` and ``b = β1·a/a'`` the new ``E`` is the new ``M`` over ``a'``; the scale is
a running mean of the factors, of their size for ever. The same goes for ``V = a2·E2`` with ``f²``. In

.. math:: w ← w·(1 − lr·wd) − lr·\frac{a'·E/c_1}{\sqrt{a2'·E2/c_2} + ε}

the scales and the bias corrections ``c1``, ``c2`` are numbers, which go into AdamW's learning rate and epsilon.
Its own bias corrections are switched off by a step count without end.

Small tensors are multiplied by their scale after each step: that costs nothing there, and whoever looks into the
state of a bias or a norm finds ``M`` and ``V``.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hf_stablespam.optim.plan import Options, Plan, State

SMALL = 1 << 14  # entries
LEAST_MAX = 1e-10  # of a gradient: squares of its small entries must stay in the range of float32
LEAST_SHARE = 1e-9  # of the gradient in the new moments, or AdamW's float32 coefficients round it away
LEAST_SCALE = 1e-30  # of the moments, which float32 must hold
_ENDLESS = torch.tensor(1e30, device="cpu")  # steps after which AdamW corrects no bias


class Coefficients(NamedTuple):
    """With which AdamW takes a gradient as it is."""

    scale: float  # a'
    scale_sq: float  # a2'
    beta1: float  # b
    beta2: float
    lr: float
    eps: float
    weight_decay: float


def direct_coefficients(grad_max: float, plan: Plan, options: Options) -> Coefficients | None:
    """The scales and coefficients of this step, or ``None`` where float32 would lose something.

    Args:
        grad_max: ``max|g|``.
        plan: this step's plan, with a finite gradient.
        options: the parameter group.
    """
    if not (grad_max > LEAST_MAX and plan.factor > 0):
        return None
    lr, beta1, beta2 = float(options["lr"]), plan.beta1, options["betas"][1]
    scale = beta1 * plan.carry + (1 - beta1) * plan.factor
    scale_sq = beta2 * plan.carry_sq + (1 - beta2) * plan.factor * plan.factor
    share, share_sq = (1 - beta1) * plan.factor / scale, (1 - beta2) * plan.factor * plan.factor / scale_sq
    if min(share, share_sq) < LEAST_SHARE or not LEAST_SCALE < scale_sq < 1 / LEAST_SCALE:
        return None
    root, correction2 = math.sqrt(scale_sq), math.sqrt(plan.correction2)
    own_lr = lr * scale / root * correction2 / plan.correction1
    return Coefficients(
        scale=scale,
        scale_sq=scale_sq,
        beta1=1 - share,
        beta2=1 - share_sq,
        lr=own_lr,
        eps=options["eps"] * correction2 / root,
        weight_decay=options["weight_decay"] * lr / own_lr if own_lr else 0.0,
    )


def scales_to_keep(param: Tensor, coefficients: Coefficients) -> dict[str, float]:
    """The scales of the moments after this step, by their names in the state."""
    if param.numel() <= SMALL:
        return {"exp_avg_scale": 1, "exp_avg_sq_scale": 1}
    return {"exp_avg_scale": coefficients.scale, "exp_avg_sq_scale": coefficients.scale_sq}


def direct_update(
    param: Tensor, grad: Tensor, state: State, coefficients: Coefficients, plan: Plan, options: Options
) -> None:
    """Run AdamW on one tensor; its gradient is clipped already.

    Args:
        param: ``w``.
        grad: ``g``, clipped.
        state: with the moments, which share the layout of ``w`` and ``g``.
        coefficients: from `direct_coefficients`.
        plan: this step's plan.
        options: the parameter group.
    """
    if plan.carry == 0:
        state["exp_avg"].zero_()
        state["exp_avg_sq"].zero_()
    torch._fused_adamw_(
        [param],
        [grad],
        [state["exp_avg"]],
        [state["exp_avg_sq"]],
        [],
        [_ENDLESS],
        lr=coefficients.lr,
        beta1=coefficients.beta1,
        beta2=coefficients.beta2,
        weight_decay=coefficients.weight_decay,
        eps=coefficients.eps,
        amsgrad=False,
        maximize=options["maximize"],
    )
    if param.numel() <= SMALL:
        state["exp_avg"].mul_(coefficients.scale)
        state["exp_avg_sq"].mul_(coefficients.scale_sq)
