r"""PyTorch's fused AdamW on the gradient as it is, with AdaGN's factor in the coefficients.

The update wants ``M ← β1·M + (1−β1)·f·g``, and AdamW computes ``E ← b·E + (1−b)·g``. So ``E`` is kept with a scale:
``M = a·E``. With ``a' = β1·a + (1−β1)·f`` and ``b = β1·a/a'`` the new ``E`` is the new ``M`` over ``a'``; the scale is
a running mean of the factors, of their size for ever. The same goes for ``V = a2·E2`` with ``f²``. In

.. math:: w ← w·(1 − lr·wd) − lr·\frac{a'·E/c_1}{\sqrt{a2'·E2/c_2} + ε}

the scales and the bias corrections ``c1``, ``c2`` are numbers, which go into AdamW's learning rate and epsilon.
Its own bias corrections are switched off by a step count without end.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from hf_stablespam.optim.cpu_sweep import Patch
from hf_stablespam.optim.pieces import Piece, as_blocks
from hf_stablespam.optim.plan import Batch, Options, Plan

SMALL = 1 << 14  # entries; smaller tensors go through AdamW together, see `cpu_scratch`
LEAST_MAX = 1e-10  # of a gradient: squares of its small entries must stay in the range of float32
LEAST_SHARE = 1e-9  # of the gradient in the new moments, or AdamW's float32 coefficients round it away
ENDLESS = 1e30  # steps after which AdamW corrects no bias


class DirectNumbers(NamedTuple):
    """For each tensor whether AdamW can take its gradient as it is, and with which coefficients; float64 vectors."""

    fits: Tensor  # bool
    scale: Tensor  # a'
    scale_sq: Tensor  # a2'
    beta1: Tensor  # b
    beta2: Tensor
    lr: Tensor
    eps: Tensor


def direct_numbers(batch: Batch, grad_max: Tensor, plan: Plan, options: Options) -> DirectNumbers:
    """The scales and coefficients of this step.

    Args:
        batch: parameters, gradients, states.
        grad_max: ``max|g|`` of each tensor.
        plan: this step's plan.
        options: the parameter group.
    """
    lr, beta2 = float(options["lr"]), options["betas"][1]
    factor, carry, carry_sq = plan.factor.double(), plan.carry.double(), plan.carry_sq.double()
    kept, kept_sq = plan.beta1.double() * carry, beta2 * carry_sq
    scale = kept + (1 - plan.beta1.double()) * factor
    scale_sq = kept_sq + (1 - beta2) * factor.square()
    own_beta1, own_beta2 = kept / scale, kept_sq / scale_sq
    root, correction2 = scale_sq.sqrt(), plan.correction2.double().sqrt()
    fits = plan.finite & (grad_max > LEAST_MAX) & (1 - own_beta1 > LEAST_SHARE) & (1 - own_beta2 > LEAST_SHARE)
    return DirectNumbers(
        fits=fits & torch.tensor([_is_large_and_direct(batch, index) for index in range(len(batch.params))]),
        scale=scale.to(plan.factor.dtype),
        scale_sq=scale_sq.to(plan.factor.dtype),
        beta1=own_beta1,
        beta2=own_beta2,
        lr=lr * scale / root * correction2 / plan.correction1.double(),
        eps=options["eps"] * correction2 / root,
    )


def _is_large_and_direct(batch: Batch, index: int) -> bool:
    param, state = batch.params[index], batch.states[index]
    return param.numel() > SMALL and param.dtype == state["exp_avg"].dtype == state["clip_max"].dtype


def direct_update(
    batch: Batch,
    pieces: list[Piece],
    patches: dict[int, Patch],
    numbers: DirectNumbers,
    plan: Plan,
    options: Options,
) -> None:
    """Run AdamW on each tensor that fits, with the clipped blocks put into its gradient for as long as that takes.

    Args:
        batch: parameters, gradients, states.
        pieces: all pieces of all gradients.
        patches: blocks with spikes, by the index of their piece.
        numbers: from `direct_numbers`.
        plan: this step's plan.
        options: the parameter group.
    """
    spiked: dict[int, list[tuple[Piece, Patch]]] = {}
    for index, patch in patches.items():
        spiked.setdefault(pieces[index].owner, []).append((pieces[index], patch))
    carries, endless = plan.carry.tolist(), torch.tensor(ENDLESS)
    for owner, (fits, _, _, *coefficients) in enumerate(zip(*(column.tolist() for column in numbers), strict=True)):
        if fits:
            state = batch.states[owner]
            if carries[owner] == 0:
                state["exp_avg"].zero_()
                state["exp_avg_sq"].zero_()
            tensors = [batch.params[owner], batch.grads[owner], state["exp_avg"], state["exp_avg_sq"]]
            _with_patches(spiked.get(owner, []), partial(_adamw, tensors, endless, coefficients, options))


def _with_patches(spiked: list[tuple[Piece, Patch]], run: Callable[[], None]) -> None:
    """Run with the gradient's spikes clipped, and leave the gradient exactly as it was."""
    blocks = [(as_blocks(piece.grad), patch.rows, *patch.blocks(piece, piece.grad.dtype)) for piece, patch in spiked]
    try:
        for target, rows, _, clipped in blocks:
            target.index_copy_(0, rows, clipped)
        run()
    finally:
        for target, rows, original, _ in blocks:
            target.index_copy_(0, rows, original)


def _adamw(tensors: list[Tensor], endless: Tensor, coefficients: list[float], options: Options) -> None:
    param, grad, exp_avg, exp_avg_sq = tensors
    beta1, beta2, lr, eps = coefficients
    torch._fused_adamw_(
        [param],
        [grad],
        [exp_avg],
        [exp_avg_sq],
        [],
        [endless],
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=options["weight_decay"] * float(options["lr"]) / lr if lr else 0.0,
        eps=eps,
        amsgrad=False,
        maximize=options["maximize"],
    )
