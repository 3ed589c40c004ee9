"""Which figures of a step are reported, and how they combine: over the tensors of a part, and over steps."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

By = Literal["block", "tensor"] | None


class Figure(NamedTuple):
    """How a figure combines.

    Attributes:
        over_tensors: "root" (of the sum of squares), "max", "sum", or "mean" (of those that are not zero).
        whole: what is reported of the whole model: of the last step, or over the steps since the last report.
        part: what is reported of each block or tensor.
    """

    over_tensors: str
    whole: tuple[str, ...]
    part: tuple[str, ...]


_ALL = ("last", "mean", "max")

FIGURES: Mapping[str, Figure] = {
    "norm": Figure("root", _ALL, _ALL),
    "stable_norm": Figure("root", _ALL, ("last",)),
    "largest": Figure("max", _ALL, ("max",)),
    "clip_threshold": Figure("max", _ALL, ("last",)),
    "norm_factor": Figure("mean", _ALL, ("last",)),
    "spike_score": Figure("max", _ALL, ("max",)),
    "spikes": Figure("sum", ("sum",), ("sum",)),
    "clipped": Figure("sum", ("sum", "share"), ("share",)),
    "nonfinite": Figure("sum", ("sum",), ("sum",)),
    "resets": Figure("max", ("sum",), ()),
    "weight_norm": Figure("root", ("last",), ("last",)),
    "update_norm": Figure("root", _ALL, ("last",)),
    "update_ratio": Figure("ratio", _ALL, ("max",)),
}
_LABELS = {"last": "", "sum": "", "mean": "_mean", "max": "_max", "share": "_share"}


def label(figure: str, kind: str, part: str) -> str:
    """Name of a figure in the report: `norm`, `norm_max`, and with a part `norm_max/model.layers.0`."""
    return f"{figure}{_LABELS[kind]}" + (f"/{part}" if part else "")


def block_of(name: str) -> str:
    """The block that a parameter belongs to: its name up to the first number, otherwise that of its module.

    Example:
        >>> block_of("model.layers.3.self_attn.q_proj.weight"), block_of("model.norm.weight"), block_of("scale")
        ('model.layers.3', 'model.norm', 'scale')
    """
    numbered = re.match(r"(?:.*?\.)?\d+(?=\.)", name)
    return numbered[0] if numbered else name.rpartition(".")[0] or name


def sqnr_db(names: Sequence[str], sums: Sequence[float], by: By) -> dict[str, float]:
    """Signal-to-quantisation-noise ratios in decibels, `10·log10(Σw² / Σ(w − Q(w))²)`, by their names in the report.

    Args:
        names: names of L quantised weights.
        sums: 2·L numbers, the two sums of each weight.
        by: parts to report beside the whole, as for `Parts`. A ratio that is not finite is left out.

    Example:
        >>> found = sqnr_db(["layers.0.up.weight", "layers.1.up.weight"], [10.0, 1.0, 10.0, 0.1], "block")
        >>> {name: round(decibels, 3) for name, decibels in found.items()}
        {'weight_sqnr_db': 12.596, 'weight_sqnr_db/layers.0': 10.0, 'weight_sqnr_db/layers.1': 20.0}
    """
    found: dict[str, tuple[float, float]] = {}
    for index, name in enumerate(names):
        for part in {"block": ["", block_of(name)], "tensor": ["", name], None: [""]}[by]:
            signal, noise = found.get(part, (0.0, 0.0))
            found[part] = (signal + sums[2 * index], noise + sums[2 * index + 1])
    return {
        "weight_sqnr_db" + (f"/{part}" if part else ""): 10 * math.log10(signal / noise)
        for part, (signal, noise) in found.items()
        if 0 < signal < math.inf and 0 < noise < math.inf
    }


class Parts:
    """The tensors of a model as one whole, and in blocks or one by one.

    Args:
        names: names of the N tensors, as in `named_parameters`.
        entries: number of entries of each.
        by: "block", "tensor", or None for the whole only.
        device: where the figures are.

    Attributes:
        names: names of the P parts; the first is the whole, with the empty name.
        entries: entries of each part.
    """

    def __init__(self, names: Sequence[str], entries: Sequence[int], by: By, device: torch.device) -> None:
        part_of = {"block": [block_of(name) for name in names], "tensor": list(names), None: []}[by]
        order = {name: index for index, name in enumerate(dict.fromkeys(part_of))}
        self.names = ["", *order]
        self.entries = [sum(entries), *([0] * len(order))]
        for name, count in zip(part_of, entries, strict=bool(by)):
            self.entries[1 + order[name]] += count
        self._members = torch.tensor([order[name] for name in part_of], device=device)

    def combine(self, figure: str, values: Tensor) -> Tensor:
        """A figure of N tensors (N,) as that of the parts (P,)."""
        rule = FIGURES[figure].over_tensors
        if rule == "root":
            return self._sum(values.square()).sqrt()
        if rule == "mean":
            return self._sum(values) / self._sum((values != 0).float()).clamp_min(1)
        return self._max(values) if rule == "max" else self._sum(values)

    def _sum(self, values: Tensor) -> Tensor:
        whole = values.sum()[None]
        if len(self.names) == 1:
            return whole
        parts = torch.zeros(len(self.names) - 1, device=values.device).index_add_(0, self._members, values)
        return torch.cat([whole, parts])

    def _max(self, values: Tensor) -> Tensor:
        whole = values.amax()[None]
        if len(self.names) == 1:
            return whole
        parts = torch.zeros(len(self.names) - 1, device=values.device)
        return torch.cat([whole, parts.scatter_reduce_(0, self._members, values, "amax", include_self=False)])
