"""What transformers' implementations of experts are given in the place of the module: its rounded weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hf_stablespam.quant.layers.matmul import StraightThrough


def weight_names(experts: Any) -> list[str]:
    """Names of the weights that experts multiply by: the first product's, then the second's."""
    return ["gate_up_proj" if experts.has_gate else "up_proj", "down_proj"]


class _MasterGradient(torch.autograd.Function):
    """The rounded weight, whose gradient goes to the master weight."""

    @staticmethod
    def forward(ctx: Any, master: Tensor, rounded: Tensor) -> Tensor:  # type: ignore[override]
        ctx.dtype = master.dtype
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad.to(ctx.dtype), None


class StandIn:
    """What transformers' implementations take for the module: rounded weights, a gate that rounds, the rest as is.

    Args:
        experts: the module.
        dtype: of the products.
        used: the experts whose weights are needed; `None`: all.
    """

    def __init__(self, experts: Any, dtype: torch.dtype, used: list[int] | None) -> None:
        self._experts, self._dtype, self._used = experts, dtype, used
        self._rounded: dict[str, Tensor] = {}
        for name in weight_names(experts):
            master = getattr(experts, name)
            self._rounded[name] = experts._weight(name, dtype, used)
            setattr(self, name, _MasterGradient.apply(master, self._rounded[name]))
            if experts.has_bias:
                setattr(self, f"{name}_bias", getattr(experts, f"{name}_bias").to(dtype))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._experts, name)

    def _apply_gate(self, x: Tensor) -> Tensor:
        gated = self._experts.original_class._apply_gate(self, x)
        return StraightThrough.apply(gated, self._experts.recipe.activation)

    @property
    def act_fn(self) -> Callable[[Tensor], Tensor]:
        if self._experts.has_gate:
            return self._experts.act_fn
        return lambda x: StraightThrough.apply(self._experts.act_fn(x), self._experts.recipe.activation)

    @contextmanager
    def rounded_again_in_backward(self) -> Iterator[None]:
        """Keep no rounded weight for the backward pass where nothing of the weights' size is to be kept."""
        if self._experts._saves_weights() or torch.compiler.is_compiling():
            yield
            return

        # Nothing of the stand-in is in these functions, which live as long as what they have packed.
        storages = {rounded.untyped_storage().data_ptr(): name for name, rounded in self._rounded.items()}
        experts, dtype, used = self._experts, self._dtype, self._used

        def pack(tensor: Tensor) -> Any:
            name = storages.get(tensor.untyped_storage().data_ptr())
            return tensor if name is None else (name, tensor.size(), tensor.stride(), tensor.storage_offset())

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            name, *layout = packed
            return experts.quantized(name, dtype, used).as_strided(*layout)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
