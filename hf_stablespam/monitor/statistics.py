"""Figures of a training step as tensors on the device, gathered between two logs and read in one transfer."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

# Figure → what is reported of it: the last step's value, or one over the steps since the last report.
REPORTED: Mapping[str, tuple[str, ...]] = {
    "norm": ("last", "mean", "max"),
    "stable_norm": ("last", "mean", "max"),
    "clipped": ("sum",),
    "nonfinite": ("sum",),
    "resets": ("sum",),
}


def global_norm(gradients: Iterable[Tensor]) -> Tensor:
    """The L2 norm of all gradients taken as one vector, `sqrt(Σ ‖g‖²)`, as a 0-dim tensor on their device.

    Args:
        gradients: dense gradients of any shapes; sharded ones (`DTensor`) give the norm of the whole.
    """
    norm = torch.nn.utils.get_total_norm(list(gradients))
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def stable_spam_figures(statistics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Figures of the whole model from `StableSPAM.statistics`, each a 0-dim tensor.

    Args:
        statistics: name → one entry per parameter, of the last step.

    Returns:
        `norm` and `stable_norm` (gradient before and after stabilising), `clipped` (entries above their
        threshold), `nonfinite` (tensors with a non-finite gradient), `resets` (1 if moments were reset).
    """
    return {
        "norm": torch.linalg.vector_norm(statistics["grad_norm"]),
        "stable_norm": torch.linalg.vector_norm(statistics["stable_norm"]),
        "clipped": statistics["clipped"].sum(),
        "nonfinite": statistics["nonfinite"].sum(),
        "resets": statistics["reset"].amax(),
    }


class Window:
    """Figures of the steps since the last report, kept on the device.

    Example:
        >>> window = Window()
        >>> for norm in (1.0, 4.0, 1.0):
        ...     window.add({"norm": torch.tensor(norm)})
        >>> window.take()
        {'norm': 1.0, 'norm_mean': 2.0, 'norm_max': 4.0}
    """

    def __init__(self) -> None:
        self._steps = 0
        self._kept: dict[tuple[str, str], Tensor] = {}

    def add(self, figures: Mapping[str, Tensor]) -> None:
        """Take in the figures of one step (0-dim tensors, names of `REPORTED`)."""
        self._steps += 1
        for name, value in figures.items():
            for kind in REPORTED[name]:
                before = self._kept.get((name, kind))
                self._kept[name, kind] = value if before is None else _combine(kind, before, value)

    def take(self) -> dict[str, float]:
        """The figures since the last call as Python numbers, in one transfer; empty where there were none."""
        if not self._kept:
            return {}
        device = next(iter(self._kept.values())).device
        values = torch.stack([value.to(device, torch.float32) for value in self._kept.values()]).tolist()
        report = {}
        for (name, kind), value in zip(self._kept, values, strict=True):
            label = name if kind in ("last", "sum") else f"{name}_{kind}"
            report[label] = value / self._steps if kind == "mean" else value
        self._steps = 0
        self._kept = {}
        return report


def _combine(kind: str, before: Tensor, value: Tensor) -> Tensor:
    if kind == "last":
        return value
    return torch.maximum(before, value) if kind == "max" else before + value
