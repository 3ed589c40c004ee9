"""A LoRA layer of PEFT whose forward pass multiplies by ``Q(W + s·B·A)``: by the weight that merging gives.

Importing this module imports PEFT.

With W' = W + s·B·A (DoRA: scaled to its magnitudes), and the gradient straight through Q:

    y  = Q_a(x) · Q_w(W')ᵀ + b
    ∂A = s · (Q_g(∂y) · B)ᵀ · Q_a(x)            ∂B = s · Q_g(∂y)ᵀ · (Q_a(x) · Aᵀ)

which is what ∂W' = Q_g(∂y)ᵀ · Q_a(x) gives for A and B, without that matrix. W' is made by the very operations of
PEFT's `merge`, in the same order, so that the merged weight is the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor

from hf_stablespam._sharded import is_sharded
from hf_stablespam.quant.layers.matmul import FourBitMatmul, Recipe, linear_product, on_grid, quantize_weight


class MergedLoraLinear(lora.Linear):
    """PEFT's `lora.Linear` over a `FourBitLinear`, with the adapter added to the weight before it is rounded.

    Several active adapters are added in their order. Disabled or merged, the layer is PEFT's own.

    Raises:
        ValueError: in the forward pass: dropout in training, a batch of several adapters, another variant of LoRA than
            DoRA, or adapters that FSDP2 shards by themselves.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.is_merging():
            return super().forward(x, *args, **kwargs)
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "adapters='merged': a batch of several adapters (adapter_names) has no single merged weight; give each"
                " adapter a batch of its own with set_adapter(name), or convert with adapters='separate'"
            )
        self.check_adapters()
        base, device = self._base(), x.device.type
        if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
            return self._product(x, base.weight.dtype)
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return self._product(x.to(dtype), dtype)

    def is_merging(self) -> bool:
        """Whether the weight is one with an adapter in it that is not merged."""
        return bool(not self.disable_adapters and not self.merged and self._active())

    def merged_weight(self) -> Tensor:
        """W': the weight with the active adapters in it, (out, in), in the weight's dtype, differentiable."""
        return self._merge(self._active())

    def check_adapters(self) -> None:
        """Raise about what the active adapters have that no merged weight can express."""
        for name in self._active():
            dropout: Any = self.lora_dropout[name]
            if self.training and getattr(dropout, "p", False):
                raise ValueError(
                    f"adapters='merged': lora_dropout must be 0, got {dropout.p} for {name!r}: dropout on"
                    " the adapter's input alone has no merged weight; set lora_dropout=0, or adapters='separate'"
                )
            variant = self.lora_variant.get(name)
            if variant is not None and not self._is_dora(name):
                raise ValueError(
                    f"adapters='merged' knows LoRA, rank-stabilised LoRA and DoRA, got {type(variant).__name__} for"
                    f" {name!r}; use one of these, or adapters='separate'"
                )
            if self.lora_bias.get(name) and self._base().bias is None:
                raise ValueError(
                    f"adapters='merged': lora_bias=True of {name!r} needs a layer with a bias to be merged into; set"
                    " lora_bias=False, name only layers with a bias in target_modules, or adapters='separate'"
                )
            if is_sharded(self.lora_A[name].weight) and not is_sharded(self._base().weight):
                raise ValueError(
                    "adapters='merged': lora_A and lora_B are sharded by themselves, and their weights are read outside"
                    " of their own forward pass; wrap whole blocks by FSDP2, or use adapters='separate'"
                )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the weight: the sum that the forward pass rounded, whatever `safe_merge` says."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        base = self._base()
        with torch.no_grad(), torch.autocast(base.weight.device.type, enabled=False):
            merged, bias = self._merge(names, keep_norms=True), self._bias(names)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"nan or inf in the merged weight; the adapters {', '.join(names)} are broken")
            base.weight.data = merged
            if bias is not None:
                base.bias.data = bias.to(base.bias.dtype)
        self.merged_adapters.extend(names)
        self._after_change()

    def unmerge(self) -> None:
        super().unmerge()
        self._after_change()

    def merged_from(self) -> tuple[list[Tensor], list[Any]]:
        """What `merged_weight` is made of beside the base's weight: the adapters' tensors, and which and how strong."""
        names = self._active()
        vectors: Any = self.lora_magnitude_vector
        magnitudes = [vectors[name].weight for name in names if self._is_dora(name)]
        return [*self._matrices(names), *magnitudes], [(name, self.scaling[name]) for name in names]

    def _base(self) -> Any:
        return self.get_base_layer()  # a FourBitLinear

    def _matrices(self, names: Sequence[str]) -> list[Tensor]:
        """A and B of each adapter in turn."""
        return [layers[name].weight for name in names for layers in (self.lora_A, self.lora_B)]  # type: ignore[misc]

    def _active(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.lora_A]

    def _is_dora(self, name: str) -> bool:
        return name in self.lora_magnitude_vector

    def _merge(self, names: Sequence[str], keep_norms: bool = False) -> Tensor:
        base = self._base().weight
        weight: Tensor = base
        for name in names:
            delta = self.get_delta_weight(name).to(base.device)
            if self._is_dora(name):
                magnitude: Any = self.lora_magnitude_vector[name]
                norm = magnitude.get_weight_norm(base, delta, scaling=1).detach()
                if keep_norms:  # where PEFT's unmerge looks for it
                    self._cache_store(f"{name}-weight_norm", norm)
                weight = ((magnitude.weight / norm).view(-1, 1) * (weight + delta)).to(base.dtype)
            else:
                weight = (weight + delta).to(base.dtype)
        return weight

    def _bias(self, names: Sequence[str]) -> Tensor | None:
        bias: Any = self._base().bias
        for name in names:
            if self.lora_bias.get(name):
                last: Any = self.lora_B[name]
                own = last.bias * self.scaling[name]
                bias = own if bias is None else bias + own
        return bias

    def _product(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        base, names = self._base(), self._active()
        recipe: Recipe = base.recipe
        bias = self._bias(names)
        bias = None if bias is None else bias.to(dtype)
        straight = recipe.hadamard is None and not base.weight.requires_grad and not any(map(self._is_dora, names))
        if straight:
            scalings = tuple(float(self.scaling[name]) for name in names)
            return _LowRankMatmul.apply(x, bias, self._rounded(dtype), recipe, scalings, *self._matrices(names))
        weight = self._merge(names)
        weight_q = quantize_weight(weight, recipe, dtype, base.shared_amax())
        return FourBitMatmul.apply(x, weight, bias, weight_q, base.shared_amax(), recipe)

    def _rounded(self, dtype: torch.dtype) -> Tensor:
        """Q(W') in `dtype`, made anew unless a `fixed_weights` block is open: A and B may have been written to."""
        return self._base().fixed_weight(dtype, self._round_merged)

    def _round_merged(self, dtype: torch.dtype) -> Tensor:
        base = self._base()
        with torch.no_grad():
            return quantize_weight(self.merged_weight(), base.recipe, dtype, base.shared_amax())

    def _after_change(self) -> None:
        self._base().forget_weight()


class _LowRankMatmul(torch.autograd.Function):
    """The product with a merged 4-bit weight, and the gradients of its low-rank factors.

    Arguments of `apply`: `x` (..., in); `bias` (out) or None; `weight_q` (out, in), rounded; `recipe`; `scalings`, one
    for each adapter; then A (rank, in) and B (out, rank) of each adapter in turn.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        weight_q: Tensor,
        recipe: Recipe,
        scalings: tuple[float, ...],
        *factors: Tensor,
    ) -> Tensor:
        x_q = on_grid(x, recipe.activation)
        ctx.recipe, ctx.scalings = recipe, scalings
        ctx.save_for_backward(x_q, weight_q, *factors)
        return linear_product(x_q, weight_q, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_q, weight_q, *factors = ctx.saved_tensors
        grad_q = on_grid(grad, ctx.recipe.gradient)
        rows, inputs = grad_q.reshape(-1, grad.shape[-1]), x_q.reshape(-1, x_q.shape[-1])
        grads: list[Tensor | None] = []
        for index, scaling in enumerate(ctx.scalings):
            a, b = factors[2 * index], factors[2 * index + 1]
            needs_a, needs_b = ctx.needs_input_grad[5 + 2 * index : 7 + 2 * index]
            low = grad.dtype
            grads.append(((rows @ b.to(low)).t() @ inputs).to(a.dtype) * scaling if needs_a else None)
            grads.append((rows.t() @ (inputs @ a.to(low).t())).to(b.dtype) * scaling if needs_b else None)
        grad_x = grad_q @ weight_q if ctx.needs_input_grad[0] else None
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        return grad_x, grad_bias, None, None, None, *grads
