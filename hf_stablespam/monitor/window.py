"""Figures of training steps, gathered on the device between two reports and read in one transfer."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hf_stablespam.monitor.figures import FIGURES, Parts, label


def global_norm(gradients: Iterable[Tensor]) -> Tensor:
    """The L2 norm of all gradients taken as one vector, `sqrt(Σ ‖g‖²)`, as a 0-dim tensor on their device.

    Args:
        gradients: dense gradients of any shapes; sharded ones (`DTensor`) give the norm of the whole.
    """
    norm = torch.nn.utils.get_total_norm(list(gradients))
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


class Window:
    """Figures of the steps since the last report, kept on the device.

    A value that is not finite (a norm of a gradient with `nan`) is no part of means and maxima, and a figure that
    would not be finite is left out of the report: `nan` is no JSON. The figure `nonfinite` counts such gradients.

    Args:
        parts: the whole model and its parts.

    Example:
        >>> window = Window(Parts(["weight"], [6], None, torch.device("cpu")))
        >>> for norm in (1.0, 4.0, 1.0):
        ...     window.add({"norm": torch.tensor([norm])})
        >>> window.take()[0]
        {'norm': 1.0, 'norm_mean': 2.0, 'norm_max': 4.0}
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._clear()

    def follow(self, parts: Parts) -> None:
        """Go on with a model of other tensors; what was gathered stays where the parts have the same names."""
        changed, seen = parts.names != self._parts.names, self._seen()
        self._parts = parts
        if changed:
            self._clear()
        else:
            self._past, self._steps = seen, 0

    def _seen(self) -> list[int]:
        """Entries of each part, summed over the steps since the last report."""
        return [past + self._steps * count for past, count in zip(self._past, self._parts.entries, strict=True)]

    def _clear(self) -> None:
        self._steps = 0  # with the present parts
        self._past = [0] * len(self._parts.names)  # entries of each, summed over the steps with earlier parts
        self._figures: tuple[str, ...] = ()
        self._kept: dict[str, Tensor] = {}  # each (figures, parts)

    def add(self, figures: Mapping[str, Tensor]) -> None:
        """Take in one step: names of `FIGURES`, each with one value per tensor (N,); the same names at each step."""
        combined = {name: self._parts.combine(name, values) for name, values in figures.items()}
        if "update_norm" in combined:
            combined["update_ratio"] = combined["update_norm"] / combined["weight_norm"]
        values = torch.stack(list(combined.values()))
        if self._kept and (self._figures != tuple(combined) or self._kept["last"].shape != values.shape):
            self._clear()  # restored from a run that had others
        finite = values.isfinite()
        new = {
            "sum": torch.where(finite, values, 0.0),
            "max": torch.where(finite, values, -torch.inf),
            "count": finite.float(),
        }
        if self._kept:
            new = {
                "sum": self._kept["sum"] + new["sum"],
                "max": torch.maximum(self._kept["max"], new["max"]),
                "count": self._kept["count"] + new["count"],
            }
        self._kept = {"last": values, **new}
        self._figures = tuple(combined)
        self._steps += 1

    def take(self, extra: Tensor | None = None) -> tuple[dict[str, float], list[float]]:
        """The figures since the last call as Python numbers by their names in the report, in one transfer.

        Args:
            extra: another vector (E,) to be read in the same transfer.

        Returns:
            The figures (empty where there were no steps), and the numbers of `extra`.
        """
        tensors = [tensor.flatten() for tensor in (*self._kept.values(), *(() if extra is None else (extra,)))]
        if not tensors:
            return {}, []
        values = torch.cat([tensor.to(tensors[0].device, torch.float32) for tensor in tensors]).tolist()
        width = len(self._figures) * len(self._parts.names)
        kept = {kind: values[i * width : (i + 1) * width] for i, kind in enumerate(self._kept)}
        report = self._report(kept) if self._kept else {}
        self._clear()
        return report, values[len(values) - (0 if extra is None else extra.numel()) :]

    def knowledge(self) -> dict[str, Any]:
        """The steps since the last report as JSON, read from the device; empty where there are none."""
        if not self._kept:
            return {}
        rows = {kind: [_or_none(value) for value in tensor.flatten().tolist()] for kind, tensor in self._kept.items()}
        return {"figures": list(self._figures), "entries": self._seen(), "kept": rows}

    def restore(self, knowledge: Mapping[str, Any], device: torch.device) -> None:
        """Go on from what `knowledge` gave; the first step drops it where that has other figures or parts."""
        if not knowledge:
            return
        self._figures = tuple(knowledge["figures"])
        # Older checkpoints have the number of steps instead.
        entries = knowledge.get("entries", [knowledge.get("steps", 0) * count for count in self._parts.entries])
        self._past = entries if len(entries) == len(self._past) else self._past
        for kind, values in knowledge["kept"].items():
            missing = -torch.inf if kind == "max" else torch.nan
            flat = torch.tensor([missing if value is None else value for value in values], device=device)
            self._kept[kind] = flat.view(len(self._figures), -1)

    def _report(self, kept: Mapping[str, list[float]]) -> dict[str, float]:
        report: dict[str, float] = {}
        seen = self._seen()
        for part, name in enumerate(self._parts.names):
            for row, figure in enumerate(self._figures):
                place = row * len(self._parts.names) + part
                found = {kind: column[place] for kind, column in kept.items()}
                found["mean"] = found["sum"] / found["count"] if found["count"] else math.nan
                found["share"] = found["sum"] / seen[part] if seen[part] else math.nan
                kinds = FIGURES[figure].part if name else FIGURES[figure].whole
                report |= {label(figure, kind, name): found[kind] for kind in kinds if math.isfinite(found[kind])}
        return report


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
