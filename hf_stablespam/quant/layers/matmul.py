"""The three matrix products of a linear layer with 4-bit operands, as one autograd Function.

===========  =====================================  ====================================================
product      plain                                  with ``hadamard="all"`` (H orthogonal, per product)
===========  =====================================  ====================================================
forward      ``y = Q_a(x) · Q_w(W)ᵀ``               ``y = Q_a(xH) · Q_w(WH)ᵀ``
input grad   ``∂x = Q_g(∂y) · Q_w(W)``              ``∂x = Q_g(∂y H) · Q_w(Wᵀ H)ᵀ``
weight grad  ``∂W = Q_g(∂y)ᵀ · Q_a(x)``             ``∂W = Q_g(∂yᵀ H) · Q_a(xᵀ H)ᵀ``
===========  =====================================  ====================================================

A quantizer of None is the identity. ``hadamard="weight_grad"`` takes the last row from the right column and the
others from the left one. The gradient goes straight through the rounding: no term for clipped numbers, as in the
paper's code. Without a gradient format, the transform is undone after the product instead, so that the backward
pass is that of the weight and input that the forward pass really used.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_stablespam.quant.config import FourBitConfig
from hf_stablespam.quant.formats.hadamard import hadamard_transform, random_signs
from hf_stablespam.quant.formats.quantizer import Quantizer


class Recipe(NamedTuple):
    """What `FourBitConfig` says about one layer's products."""

    weight: Quantizer | None
    activation: Quantizer | None
    gradient: Quantizer | None
    hadamard: str | None
    signs: tuple[float, ...]

    @classmethod
    def of(cls, config: FourBitConfig) -> Recipe:
        """The recipe for a configuration."""
        return cls(
            weight=config.quantizer("weight"),
            activation=config.quantizer("activation"),
            gradient=config.quantizer("gradient"),
            hadamard=config.hadamard,
            signs=random_signs(config.hadamard_size, config.hadamard_seed) if config.hadamard else (),
        )

    def turn(self, x: Tensor, inverse: bool = False) -> Tensor:
        """`x` transformed along its last dimension."""
        return hadamard_transform(x, self.signs, inverse)


def on_grid(x: Tensor, quantizer: Quantizer | None, amax: Tensor | None = None) -> Tensor:
    """`x` quantized; as it is without a quantizer."""
    return x if quantizer is None else quantizer(x, amax)


def quantize_weight(weight: Tensor, recipe: Recipe, dtype: torch.dtype, amax: Tensor | None = None) -> Tensor:
    """The weight (out, in) as the forward product uses it, in `dtype`."""
    weight = weight.detach()
    if recipe.hadamard == "all":
        weight = recipe.turn(weight)
    return on_grid(weight, recipe.weight, amax).to(dtype)


def linear_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x · Wᵀ + b``, as what an autograd Function may return to callers that write into it.

    With a bias PyTorch returns a view of a matrix, into which nothing may be written outside of the Function; several
    adapters of PEFT add their own product in place.
    """
    y = F.linear(x, weight, bias)
    return y if bias is None else torch.ops.aten._unsafe_view(y, y.shape)  # the same memory, and no view


class FourBitMatmul(torch.autograd.Function):
    """``y = Q_a(x) · Q_w(W)ᵀ + b`` with the gradients of the table above.

    Arguments of `apply`: `x` (..., in) in the dtype of the product; `weight` (out, in), the master weight, which
    receives the gradient; `bias` (out) or None; `weight_q`, `quantize_weight` of the weight, or None to make it here
    and again in the backward pass, so that nothing of the weight's size is kept in between; `amax`, see `quantize`;
    `recipe`.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weight_q: Tensor | None,
        amax: Tensor | None,
        recipe: Recipe,
    ) -> Tensor:
        ctx.recipe, ctx.kept_weight = recipe, weight_q is not None
        turned = recipe.turn(x) if recipe.hadamard == "all" else x
        x_q = on_grid(turned, recipe.activation)
        if weight_q is None:
            weight_q = quantize_weight(weight, recipe, x.dtype, amax)
        # A transformed weight gradient starts from the input itself; the others from what the product saw.
        needs_x = ctx.needs_input_grad[1]
        saved_x = (x if _turns_weight_grad(recipe) else x_q) if needs_x else None
        needs_master = not ctx.kept_weight or _turns_input_grad(recipe)
        ctx.save_for_backward(saved_x, weight if needs_master else None, weight_q if ctx.kept_weight else None, amax)
        ctx.weight_dtype = weight.dtype
        return linear_product(x_q, weight_q, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, weight_q, amax = ctx.saved_tensors
        recipe: Recipe = ctx.recipe
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_q = grad  # for the products that are not transformed; made once for both
        if (need_x and not _turns_input_grad(recipe)) or (need_weight and not _turns_weight_grad(recipe)):
            grad_q = on_grid(grad, recipe.gradient)
        grad_x = grad_weight = grad_bias = None
        if need_x and _turns_input_grad(recipe):
            grad_x = _turned_product(grad, recipe.gradient, weight.t().to(grad.dtype), recipe.weight, recipe)
        elif need_x:
            if weight_q is None:
                weight_q = quantize_weight(weight, recipe, grad.dtype, amax)
            grad_x = _turned_back(grad_q @ weight_q, recipe)
        rows = grad.reshape(-1, grad.shape[-1])  # (tokens, out)
        if need_weight:
            inputs = x.reshape(-1, x.shape[-1])  # (tokens, in)
            if _turns_weight_grad(recipe):
                grad_weight = _turned_product(rows.t(), recipe.gradient, inputs.t(), recipe.activation, recipe)
            else:
                grad_weight = _turned_back(grad_q.reshape(rows.shape).t() @ inputs, recipe)
            grad_weight = grad_weight.to(ctx.weight_dtype)
        if need_bias:
            grad_bias = rows.sum(0)
        return grad_x, grad_weight, grad_bias, None, None, None


class StraightThrough(torch.autograd.Function):
    """`on_grid` with the gradient straight through: arguments of `apply` are `x` and its quantizer, or None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantizer: Quantizer | None) -> Tensor:  # type: ignore[override]
        return x.view_as(x) if quantizer is None else quantizer(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


def _turns_weight_grad(recipe: Recipe) -> bool:
    return recipe.hadamard is not None and recipe.gradient is not None


def _turns_input_grad(recipe: Recipe) -> bool:
    return recipe.hadamard == "all" and recipe.gradient is not None


def _turned_back(product: Tensor, recipe: Recipe) -> Tensor:
    """Undo the forward pass's transform of the input dimension."""
    return recipe.turn(product, inverse=True) if recipe.hadamard == "all" else product


def _turned_product(
    left: Tensor, left_quantizer: Quantizer | None, right: Tensor, right_quantizer: Quantizer | None, recipe: Recipe
) -> Tensor:
    """``Q(left H) · Q(right H)ᵀ``, both transformed and quantized along the dimension that is summed over."""
    left = on_grid(recipe.turn(left), left_quantizer)
    return left @ on_grid(recipe.turn(right), right_quantizer).t()
