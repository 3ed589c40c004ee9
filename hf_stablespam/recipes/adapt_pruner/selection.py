"""Which units go: the rule of Adapt-Pruner, as pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

# Importances that differ by less than this, relative to the largest, are equal: the rest is rounding of their mean.
_EQUAL = 1e-12


def adaptive_sparsity(
    previous: Tensor | Sequence[float],
    importance: Tensor | Sequence[float],
    *,
    step_size: float,
    amplitude: float = 0.02,
    maximum: float = 0.99,
) -> Tensor:
    """The share of its units that each layer is to lose, one step on: ``s ← clip(s + R/steps − A·ĉ, 0, maximum)``.

    ``ĉ_l = (I_l − mean I) / max_l |I_l − mean I|`` lies in [−1, 1] and has mean 0: layers that change the hidden
    state little lose more. Where all are equal ``ĉ = 0``.

    Args:
        previous: ``s_l`` after the step before (layers,); zeros at the start of a stage.
        importance: ``I_l`` of `layer_importance` (layers,).
        step_size: ``R/steps``, the mean share of a step; the official runs have 1.0/50.
        amplitude: ``A``, how far a layer's share differs from the mean, ≥ 0. Default 0.02 (the official scripts).
        maximum: the largest ``s``. Default 0.99 (the official code).

    Returns:
        ``s_l`` (layers,), float64.

    Raises:
        ValueError: ``amplitude`` or ``step_size`` below 0, ``maximum`` outside of [0, 1], or unequal lengths.

    Example:
        >>> adaptive_sparsity([0.0, 0.0], [-0.5, -0.9], step_size=0.02, amplitude=0.01)
        tensor([0.0100, 0.0300], dtype=torch.float64)
    """
    for name, value, rule in (("amplitude", amplitude, amplitude >= 0), ("step_size", step_size, step_size >= 0)):
        if not rule:
            raise ValueError(f"{name} must be at least 0, got {value}; 0.02 is the published one")
    if not 0 <= maximum <= 1:
        raise ValueError(f"maximum must be in [0, 1], got {maximum}; 0.99 is the published one")
    before, raw = (torch.as_tensor(value, dtype=torch.float64).cpu() for value in (previous, importance))
    if before.shape != raw.shape:
        raise ValueError(f"previous and importance must have one entry per layer, got {len(before)} and {len(raw)}")
    centred = raw - raw.mean()
    largest = centred.abs().max()
    if largest <= _EQUAL * raw.abs().max():
        normalised = torch.zeros_like(centred)
    else:
        normalised = centred / largest
    return (before + step_size - amplitude * normalised).clamp(0, maximum)


@dataclass(frozen=True)
class Supply:
    """The units of one kind in one layer, and what may be done to them.

    Args:
        layer: index of the layer.
        kind: ``"neurons"`` or ``"kv_heads"``.
        scores: one per present unit.
        initial: channels at the start of the stage, ``init``.
        channels: of one unit: 1 for a neuron, ``head_dim`` for a head.
        multiple: what is kept must be a multiple of this (or all).
        cost: parameters of one unit.
    """

    layer: int
    kind: str
    scores: tuple[float, ...]
    initial: int
    channels: int
    multiple: int
    cost: int


@dataclass(frozen=True)
class Chunk:
    """Units that go together or stay together: one, or as many as make the rest a multiple again."""

    supply: Supply
    units: tuple[int, ...]

    @property
    def score(self) -> float:
        """Mean score of its units."""
        return sum(self.supply.scores[unit] for unit in self.units) / len(self.units)

    @property
    def parameters(self) -> int:
        """Parameters that go with it."""
        return self.supply.cost * len(self.units)


def to_remove(supply: Supply, sparsity: float) -> int | None:
    """How many units the rule takes: ``current − ⌊init·(1 − s)⌋``, in whole units, less what the multiple keeps.

    Returns:
        The number; `None` where the rule asks for all that are left, which leaves all of them.
    """
    present = len(supply.scores)
    surplus = present * supply.channels - math.floor(supply.initial * (1 - sparsity))
    units = surplus // supply.channels
    if units >= present:
        return None
    kept = -(-(present - max(units, 0)) // supply.multiple) * supply.multiple
    return max(present - kept, 0)


def lowest(supply: Supply, count: int) -> list[Chunk]:
    """The `count` units of the lowest scores, in chunks that leave a multiple, the lowest first."""
    order = sorted(range(len(supply.scores)), key=lambda unit: supply.scores[unit])[:count]
    first = count % supply.multiple or supply.multiple
    bounds = [0, *range(first, count, supply.multiple), count]
    return [Chunk(supply, tuple(order[a:b])) for a, b in pairwise(bounds) if b > a]


Bundle = tuple[Chunk, ...]  # chunks that go together: one, or with equal widths one of every layer


def bundles(chunks: list[list[Chunk]], equal_widths: bool) -> list[Bundle]:
    """The chunks of all supplies in the order in which they go: neurons before heads, the lowest scores first.

    Args:
        chunks: of each supply, from `lowest`.
        equal_widths: tie the n-th chunks of one kind together over the layers.
    """
    result = []
    for kind in ("neurons", "kv_heads"):
        own = [found for found in chunks if found and found[0].supply.kind == kind]
        if equal_widths:
            result += list(zip(*own, strict=True))
        else:
            result += sorted(((chunk,) for found in own for chunk in found), key=lambda bundle: bundle[0].score)
    return result


def trimmed(candidates: list[Bundle], excess: int) -> list[Bundle]:
    """As few of the candidates, in their order, as remove `excess` parameters; all if they remove less.

    Where the last of them was a head, which removes many at once, the neurons of the highest scores are given back.
    """
    taken: list[Bundle] = []
    left = excess
    for bundle in candidates:
        if left <= 0:
            break
        taken.append(bundle)
        left -= parameters_of(bundle)
    for bundle in reversed([bundle for bundle in taken if bundle[0].supply.kind == "neurons"]):
        if left + parameters_of(bundle) > 0:
            break
        taken.remove(bundle)
        left += parameters_of(bundle)
    return taken


def parameters_of(bundle: Bundle) -> int:
    """Parameters that go with a bundle."""
    return sum(chunk.parameters for chunk in bundle)
