"""What is kept of each layer, and the report of what a pruning did. Both can be written as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LayerPlan:
    """The units of one layer that stay, as indices into those it has.

    Args:
        neurons: MLP neurons, in ascending order; `None` keeps all.
        kv_heads: key-value heads, each with its own query heads, in ascending order; `None` keeps all.
    """

    neurons: tuple[int, ...] | None = None
    kv_heads: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("neurons", "kv_heads"):
            kept = getattr(self, name)
            if kept is not None:
                object.__setattr__(self, name, tuple(int(index) for index in kept))


@dataclass(frozen=True)
class PruningPlan:
    """What `prune_units` keeps, layer by layer from the first.

    Args:
        layers: one `LayerPlan` per decoder layer, or dictionaries with its fields.

    Example:
        >>> plan = PruningPlan([{"neurons": [0, 2]}, {"kv_heads": [1]}])
        >>> plan.layers[0]
        LayerPlan(neurons=(0, 2), kv_heads=None)
    """

    layers: Sequence[LayerPlan]

    def __post_init__(self) -> None:
        layers = tuple(one if isinstance(one, LayerPlan) else LayerPlan(**one) for one in self.layers)
        object.__setattr__(self, "layers", layers)


@dataclass(frozen=True)
class PruningStep:
    """One of the steps of `adapt_prune`.

    Args:
        parameters: of the model after the step.
        loss: mean loss of the calibration batches before it.
        importance: raw ``I_l``, one per layer.
        sparsity: ``s_l``, one per layer.
        removed: per layer the neurons and key-value heads that went, as indices into the model's before the first step.
    """

    parameters: int
    loss: float
    importance: tuple[float, ...]
    sparsity: tuple[float, ...]
    removed: tuple[LayerPlan, ...]


@dataclass(frozen=True)
class PruningReport:
    """What was done to a model.

    Args:
        parameters_before: of the model, tied ones counted once.
        parameters_after: likewise.
        target_parameters: what was asked for; `None` where a plan was carried out.
        kept: what is left of each layer, as indices into what it had before.
        steps: the steps of `adapt_prune`; none where a plan was carried out.
        refused: how often a layer kept all of a kind because the rule had asked for its last unit.
        reset: parameters whose optimizer state could not be kept and was reset, by name.

    Example:
        >>> report = PruningReport(100, 80, 80, PruningPlan([LayerPlan((0,), (0,))]))
        >>> PruningReport.from_json(report.to_json()) == report
        True
        >>> report.reached, report.widths
        (True, [{'intermediate_size': 1, 'kv_heads': 1}])
    """

    parameters_before: int
    parameters_after: int
    target_parameters: int | None
    kept: PruningPlan
    steps: tuple[PruningStep, ...] = ()
    refused: int = 0
    reset: tuple[str, ...] = ()

    @property
    def reached(self) -> bool:
        """Whether the model is as small as it was asked to be."""
        return self.target_parameters is None or self.parameters_after <= self.target_parameters

    @property
    def widths(self) -> list[dict[str, int]]:
        """Units that are left in each layer."""
        return [
            {"intermediate_size": len(layer.neurons or ()), "kv_heads": len(layer.kv_heads or ())}
            for layer in self.kept.layers
        ]

    @property
    def sparsity(self) -> tuple[float, ...]:
        """``s_l`` after the last step; empty where there was none."""
        return self.steps[-1].sparsity if self.steps else ()

    def figures(self) -> dict[str, float]:
        """What goes into the training logs."""
        shares = self.sparsity or (0.0,)
        names = {"min": min(shares), "mean": sum(shares) / len(shares), "max": max(shares)}
        sparsity = {f"pruning/sparsity_{name}": value for name, value in names.items()}
        return {"pruning/parameters": self.parameters_after, **sparsity}

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold; `from_dict` takes it back."""
        return asdict(self)

    def to_json(self) -> str:
        """The report as JSON, with the kept indices of each layer."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> PruningReport:
        """The report that `to_dict` wrote."""
        steps = tuple(
            PruningStep(
                step["parameters"],
                step["loss"],
                tuple(step["importance"]),
                tuple(step["sparsity"]),
                tuple(LayerPlan(**layer) for layer in step["removed"]),
            )
            for step in saved["steps"]
        )
        rest = {key: value for key, value in saved.items() if key not in ("kept", "steps", "reset")}
        return cls(kept=PruningPlan(saved["kept"]["layers"]), steps=steps, reset=tuple(saved["reset"]), **rest)

    @classmethod
    def from_json(cls, text: str) -> PruningReport:
        """The report that `to_json` wrote."""
        return cls.from_dict(json.loads(text))
