"""What `adapt_prune` is asked for: its options, the target, and the units of a model that they allow to go."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from hf_stablespam import FourBitLinear
from hf_stablespam.recipes.adapt_pruner.model.layers import DecoderLayer, count_parameters, find_layers, shared_groups
from hf_stablespam.recipes.adapt_pruner.selection import Supply


@dataclass(frozen=True)
class Options:
    """The options of `adapt_prune`, checked; its description says what they mean."""

    steps: int = 50
    amplitude: float = 0.02
    ratio: float = 1.0
    multiple_of: int | None = None
    prune_attention: bool = True
    keep_layers: Sequence[int] = ()
    equal_widths: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep_layers", tuple(self.keep_layers))
        if type(self.steps) is not int or self.steps < 1:
            raise ValueError(f"steps must be an integer of at least 1, got {self.steps!r}; 50 is the published one")
        if not 0 <= self.amplitude < math.inf:
            raise ValueError(f"amplitude must be at least 0, got {self.amplitude!r}; 0.02 is the published one")
        if not 0 < self.ratio < math.inf:
            raise ValueError(f"ratio must be above 0, got {self.ratio!r}; 1.0 is the published one")
        if self.multiple_of is not None and (type(self.multiple_of) is not int or self.multiple_of < 1):
            raise ValueError(
                f"multiple_of must be an integer of at least 1, got {self.multiple_of!r}; 1 rounds nothing"
            )
        if self.equal_widths and self.keep_layers:
            raise ValueError(
                f"equal_widths=True cuts all layers alike, got keep_layers={list(self.keep_layers)}; use one of the two"
            )

    def of_cut(self, index: int) -> Options:
        """The options of one of several cuts, each step of which has a seed of its own."""
        return replace(self, seed=self.seed + index * self.steps)


def absolute_target(target_parameters: int | float, present: int) -> int:
    """The target as a number of parameters.

    Raises:
        ValueError: it is not above 0.
    """
    if isinstance(target_parameters, bool) or not isinstance(target_parameters, int | float) or target_parameters <= 0:
        raise ValueError(
            f"target_parameters must be a number of parameters, or a share as a float, got {target_parameters!r}"
        )
    return target_parameters if isinstance(target_parameters, int) else int(target_parameters * present)


def check_target(model: nn.Module, target: int, options: Options) -> None:
    """Raise before anything is done if the target cannot be reached.

    Raises:
        ValueError: it is below what is left with one unit per layer, or a multiple that heads cannot keep.
    """
    layers = find_layers(model)
    floor = count_parameters(model)
    for supply in supplies(layers, options, None, None):
        present = len(supply.scores)
        floor -= (present - min(present, supply.multiple)) * supply.cost
    if target < floor:
        raise ValueError(
            f"target_parameters must be at least {floor}, which is left with one unit (or multiple_of) in each layer,"
            f" got {target}; ask for more, or for fewer keep_layers"
        )


def supplies(
    layers: list[DecoderLayer], options: Options, scores: Any, initial: list[dict[str, int]] | None
) -> list[Supply]:
    """What may be cut: the units of all layers but the kept ones, those of shared layers once."""
    kept = kept_layers(options.keep_layers, len(layers))
    found = []
    for first, *others in shared_groups(layers):
        if kept & {first, *others}:
            continue
        layer = layers[first]
        for kind in ("neurons", "kv_heads") if options.prune_attention else ("neurons",):
            channels = layer.head_dim if kind == "kv_heads" else 1
            present = getattr(layer, kind)
            own = getattr(scores[first], kind).tolist() if scores else [0.0] * present
            start = initial[first][kind] if initial else present
            multiple = _multiple(layer, kind, options.multiple_of)
            found.append(
                Supply(first, kind, tuple(own), start * channels, channels, multiple, layer.unit_parameters(kind))
            )
    if options.equal_widths:
        for kind in ("neurons", "kv_heads"):
            if len({len(supply.scores) for supply in found if supply.kind == kind}) > 1:
                raise ValueError(
                    f"equal_widths=True needs layers with equally many {kind}; this model's differ already"
                )
    return found


def kept_layers(keep_layers: Sequence[int], count: int) -> set[int]:
    """The indices as numbers from 0.

    Raises:
        ValueError: one is not an index of a layer.
    """
    for index in keep_layers:
        if type(index) is not int or not -count <= index < count:
            raise ValueError(f"keep_layers must hold layer indices from {-count} to {count - 1}, got {index!r}")
    return {index % count for index in keep_layers}


def _multiple(layer: DecoderLayer, kind: str, multiple_of: int | None) -> int:
    """Units of a kind that are kept together."""
    linear = layer.linear("down_proj" if kind == "neurons" else "o_proj")
    wanted = multiple_of
    if wanted is None:
        wanted = _group(linear)
        if linear.weight.shape[1] % wanted:
            return 1  # the layer cannot be packed as it is
    if kind == "neurons":
        return wanted
    inputs = layer.kv_heads * layer.queries * layer.head_dim
    if inputs % wanted:
        raise ValueError(
            f"multiple_of must divide the {inputs} inputs of {layer.path('o_proj')} (heads × head_dim), got {wanted};"
            f" use {math.gcd(wanted, inputs)}, or prune_attention=False"
        )
    return wanted // math.gcd(wanted, layer.queries * layer.head_dim)


def _group(linear: nn.Linear) -> int:
    """Numbers along a row that share a scale; 1 in full precision."""
    if not isinstance(linear, FourBitLinear):
        return 1
    quantizer = linear.four_bit.quantizer("weight") or linear.four_bit.quantizer("activation")
    return quantizer.group_size if quantizer is not None else 1
