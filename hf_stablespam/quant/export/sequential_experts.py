"""Experts that transformers takes apart where a checkpoint is packed: Llama 4's become a list of ordinary MLPs.

A packed checkpoint must hold them so: `from_pretrained` makes what it does not find anew, with no more than a line of
its report. Engines read Llama 4 in the same form.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

SEQUENTIAL = ("Llama4TextExperts",)


def sequential_experts(model: nn.Module) -> dict[str, Any]:
    """Such blocks of experts by name."""
    return {name: module for name, module in model.named_modules() if type(module).__name__ in SEQUENTIAL}


def take_apart(model: nn.Module, tensors: dict[str, Tensor]) -> list[str]:
    """Replace the experts' tensors in a state dict, in place; return the names of the linear layers they become."""
    layers: list[str] = []
    for name in sequential_experts(model):
        gate_up, down = tensors.pop(f"{name}.gate_up_proj"), tensors.pop(f"{name}.down_proj")
        for layer, weight in _linears(name, gate_up, down):
            tensors[f"{layer}.weight"] = weight.contiguous()
            layers.append(layer)
    return layers


def _linears(name: str, gate_up: Tensor, down: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Each expert's three layers with their weights (out, in), from (experts, in, 2 · out) and (experts, out, in)."""
    for expert in range(len(down)):
        gate, up = gate_up[expert].t().chunk(2)
        yield f"{name}.{expert}.gate_proj", gate
        yield f"{name}.{expert}.up_proj", up
        yield f"{name}.{expert}.down_proj", down[expert].t()
