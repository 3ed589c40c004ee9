"""The largest magnitudes that layers see at their inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_stablespam._evaluating import evaluating


def input_amax(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Mapping[str, Any]] | None
) -> dict[str, Tensor]:
    """Run `model` on `batches` and return the largest magnitude at the input of each layer.

    Args:
        model: the model; its mode is put back afterwards.
        layers: which layers to watch, by name.
        batches: keyword arguments of the model, one dictionary per call.
    """
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            amax = inputs[0].detach().abs().amax().float()
            found[name] = torch.maximum(found[name], amax) if name in found else amax

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        with evaluating(model), torch.no_grad():
            for batch in batches or ():
                model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return found
