"""The largest magnitudes that layers see at their inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_stablespam._evaluating import evaluating
from hf_stablespam._sharded import all_reduce, layout, sharing

SHOWN = 3  # layers that an error names
UNREACHED = -1.0  # no magnitude


def input_amax(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Mapping[str, Any]] | None
) -> dict[str, Tensor]:
    """Run `model` on `batches` and return the largest magnitude at the input of each layer that they reach.

    Processes that share the layers' weights may have batches of their own, as many each: the magnitude is that of all.

    Args:
        model: the model; its mode is put back afterwards.
        layers: which layers to watch, by name.
        batches: keyword arguments of the model, one dictionary per call.
    """
    found: dict[str, Tensor] = {}
    processes = sharing(layout(layer.weight) for layer in layers.values())

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if not inputs[0].numel():  # of an expert without a token
                return
            amax = inputs[0].detach().abs().amax().float().nan_to_num(torch.inf, torch.inf)
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
    if processes:
        values = torch.tensor([[found.get(name, UNREACHED) for name in layers]])
        all_reduce(values, processes, torch.distributed.ReduceOp.MAX)
        found = {name: value for name, value in zip(layers, values[0], strict=True) if value != UNREACHED}
    return found


def check_reached(layers: Sequence[str], amax: Mapping[str, Tensor]) -> None:
    """Raise unless calibration gave each of the layers a scale for its inputs.

    Args:
        layers: names of the layers.
        amax: what `input_amax` found.

    Raises:
        ValueError: it did not; the message names the first of these layers.
    """
    missing = [name for name in layers if name not in amax]
    unbounded = [name for name in layers if name in amax and not torch.isfinite(amax[name])]
    for names, what in ((missing, "did not reach"), (unbounded, "gave nan or inf to")):
        if names:
            shown = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
            raise ValueError(
                f"calibration must give finite inputs to every packed layer, and {what} {shown}: no scale is known for"
                " these inputs; pass batches that reach the layers (an iterator gives each only once), or"
                " activations=False"
            )
