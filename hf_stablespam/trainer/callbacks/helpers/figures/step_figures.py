"""The figures of one training step, tensor by tensor, from the Trainer's optimizer and model."""

from collections.abc import Iterator, Mapping
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from hf_stablespam.monitor.norms import Shards
from hf_stablespam.monitor.window import global_norm
from hf_stablespam.trainer.callbacks.helpers import accelerator_watch
from hf_stablespam.trainer.callbacks.helpers.unwrapping import unwrap

# Our figure ← the name in `StableSPAM.statistics`.
_FROM_STATISTICS = {
    "stable_norm": "stable_norm",
    "clip_threshold": "clip_threshold",
    "norm_factor": "norm_factor",
    "clipped": "clipped",
    "resets": "reset",
}


class Watched:
    """The parameters that an optimizer trains, by their names in the model.

    Args:
        model: where the names come from; a parameter that it does not have is called by its place in the optimizer.
        optimizer: the optimizer as callbacks get it.

    Attributes:
        names: names of the N parameters, in the optimizer's order.
        params: the parameters.
        shards: how they are sharded.
    """

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        known = {id(param): name for name, param in model.named_parameters()}
        rows = [
            (known.get(id(param), f"group_{g}.parameter_{i}"), param)
            for g, group in enumerate(unwrap(optimizer).param_groups)
            for i, param in enumerate(group["params"])
        ]
        self.names = [name for name, _ in rows]
        self.params = [param for _, param in rows]
        self.shards = Shards(self.params)

    def are_those_of(self, optimizer: Any) -> bool:
        """Whether the optimizer still trains these parameters: pruning puts others in their place."""
        count = sum(len(group["params"]) for group in unwrap(optimizer).param_groups)
        return count == len(self.params) and all(map(is_, self.params, _params(optimizer)))

    def places_in(self, earlier: "Watched") -> list[int | None]:
        """For each parameter the place that the one of its name had earlier; None for a new name."""
        places = {name: place for place, name in enumerate(earlier.names)}
        return [places.get(name) for name in self.names]

    def gradients(self) -> list[Tensor]:
        """This process's shards of the gradients; an empty one for a parameter without gradient."""
        empty = [param.new_empty(0) for param in self.params]
        grads = [param.grad for param in self.params]
        present = [param if grad is None else grad for param, grad in zip(self.params, grads, strict=True)]
        local = self.shards.local(present)
        rows = zip(local, grads, empty, strict=True)
        return [none if grad is None else shard.detach() for shard, grad, none in rows]

    def weights(self) -> list[Tensor]:
        """This process's shards of the weights."""
        return [shard.detach() for shard in self.shards.local(self.params)]


def _params(optimizer: Any) -> Iterator[Tensor]:
    return chain.from_iterable(group["params"] for group in unwrap(optimizer).param_groups)


def optimizer_statistics(optimizer: Any) -> Mapping[str, Tensor] | None:
    """`statistics` of `StableSPAM`, or of what `stabilize` put in front of another optimizer; None for others."""
    optimizer = unwrap(optimizer)
    return getattr(getattr(optimizer, "stabilizer", optimizer), "statistics", None)


@torch.no_grad()
def gradient_figures(watched: Watched, optimizer: Any, gradients: list[Tensor], clips: bool) -> dict[str, Tensor]:
    """What the optimizer saw in this step and what it did to it; each (N,) float32 on the device.

    Args:
        watched: its parameters.
        optimizer: the optimizer as callbacks get it, after its step.
        gradients: what `watched.gradients()` gives.
        clips: whether the Trainer clips (`max_grad_norm`): magnitudes are then scaled back to before.

    Returns:
        `norm`, `largest` (magnitude of an entry) and `nonfinite`; where the optimizer has statistics also
        `clip_threshold`, `clipped`, `norm_factor`, `stable_norm` and `resets`, `nan` where they are unknown.
    """
    statistics = optimizer_statistics(optimizer)
    # In float16 a step with infinite gradients is skipped: then the optimizer's figures are those of an older one.
    current = bool(statistics) and not getattr(optimizer, "step_was_skipped", False)
    if current:
        assert statistics is not None
        norm, largest, nonfinite = (statistics[name].float() for name in ("grad_norm", "grad_max", "nonfinite"))
    else:
        norm, largest = watched.shards.norms(gradients)[0], watched.shards.largest(gradients)
        nonfinite = (~norm.isfinite()).float()
    figures = {"norm": norm, "largest": largest, "nonfinite": nonfinite}
    if statistics is not None:
        unknown = torch.full_like(norm, torch.nan)
        figures |= {ours: statistics[name].float() if current else unknown for ours, name in _FROM_STATISTICS.items()}
        for name in ("stable_norm", "norm_factor"):  # nothing of such a tensor entered the moments
            figures[name] = torch.where(nonfinite > 0, 0.0, figures[name])
    if clips and (factor := accelerator_watch.clipping_coefficient(optimizer)) is not None:
        scale = 1 / torch.as_tensor(factor, device=norm.device).float()
        figures |= {name: figures[name] * scale for name in ("norm", "largest", "clip_threshold") if name in figures}
    return figures


def raw_gradient_norm(model: nn.Module, optimizer: Any) -> Tensor:
    """The norm of the whole gradient before the Trainer's clipping (0-dim); call it in `on_optimizer_step`.

    There the gradients are still present and, in float16, no longer scaled.
    """
    norm = accelerator_watch.unclipped_norm(optimizer)
    if norm is None:
        return global_norm(p.grad for p in model.parameters() if p.grad is not None)
    return torch.as_tensor(norm).detach()
