"""From runs to what a report shows: curves, marks and heat maps, as plain data for any plotting library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hf_stablespam.monitor.report.runs import Run, is_number

# Norms by block or tensor: the largest since the last log where they were logged, otherwise the last ones.
BLOCK_PREFIXES = ("gradients/norm_max/", "gradients/norm/")
# Key in the page, title, unit, logged quantity, logarithmic axis: what needs no more than one curve for a run.
PLAIN_PANELS = (
    ("spike_score", "Spike score", "largest entry / what is usual", "gradients/spike_score_max", True),
    ("norm_factor", "AdaGN's factor", "factor on the gradient", "gradients/norm_factor", True),
    ("update_ratio", "Update to weight", "norm of the update / norm of the weights", "gradients/update_ratio", True),
    ("sqnr", "Quantisation error of the weights", "signal to noise in dB", "gradients/weight_sqnr_db", False),
    ("learning_rate", "Learning rate", "", "learning_rate", False),
    ("throughput", "Throughput", "tokens per second", "train_tokens_per_second", False),
)
# The optimizer's own resets, and those of a MomentumResetCallback.
RESET_KEYS = ("gradients/resets", "momentum/resets")
SIGNS = {"circle": "●", "triangle": "▲", "diamond": "◆"}


@dataclass(frozen=True)
class Curve:
    """One line: the run it belongs to, what it is in a word, its points, and whether it stands behind another."""

    run: int
    name: str
    steps: np.ndarray
    values: np.ndarray
    faint: bool = False


@dataclass(frozen=True)
class Marks:
    """Single steps of a run that are pointed out, such as spikes and resets, with a text for each if there is one."""

    run: int
    name: str
    steps: np.ndarray
    values: np.ndarray
    symbol: str = "circle"
    texts: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Panel:
    """One diagram over the update steps."""

    key: str
    title: str
    unit: str
    curves: list[Curve]
    log: bool = False
    marks: list[Marks] = field(default_factory=list)

    @property
    def note(self) -> str:
        """Which line is which, from what there is: strong lines, faint lines, symbols."""
        strong, faint = (sorted({curve.name for curve in self.curves if curve.faint is kind}) for kind in (False, True))
        parts = [f"Strong: {' or '.join(strong)}."] if strong and (faint or len(strong) > 1) else []
        parts += [f"Faint: {' or '.join(faint)}."] if faint else []
        symbols = dict.fromkeys((marks.symbol, marks.name) for marks in self.marks)
        return " ".join(parts + [f"{SIGNS[symbol]} {name}." for symbol, name in symbols])


@dataclass(frozen=True)
class HeatMap:
    """Gradient norms of one run: blocks from bottom to top, update steps from left to right."""

    run: int
    blocks: list[str]
    first_step: float
    last_step: float
    norms: np.ndarray  # (blocks, columns) float32


def panels(runs: Sequence[Run], points: int) -> list[Panel]:
    """Every diagram for which at least one run has logged something.

    Args:
        runs: the runs to compare.
        points: how many points of a curve to keep, about; its extremes are always kept.
    """
    found = [
        Panel("loss", "Loss", "nats per token", loss_curves(runs, points)),
        Panel("perplexity", "Perplexity", "exp(loss)", exponential(loss_curves(runs, points)), log=True),
        norm_panel(runs, points),
        Panel("clipped", *clipped_curves(runs, points)),
    ]
    found += [
        Panel(name, title, unit, curves(runs, key, title.lower(), points), log)
        for name, title, unit, key, log in PLAIN_PANELS
    ]
    return [panel for panel in found if panel.curves]


def curves(runs: Sequence[Run], key: str, name: str, points: int, faint: bool = False) -> list[Curve]:
    """The curve of one logged quantity for each run that has it."""
    found = []
    for i, run in enumerate(runs):
        steps, values = run.series(key)
        if steps:
            found.append(Curve(i, name, *thinned(steps, values, points), faint))
    return found


def loss_curves(runs: Sequence[Run], points: int) -> list[Curve]:
    """Training loss, behind it the validation loss where there is one."""
    evaluated = curves(runs, "eval_loss", "validation", points)
    with_evaluation = {curve.run for curve in evaluated}
    trained = curves(runs, "loss", "training", points)
    return [
        Curve(curve.run, curve.name, curve.steps, curve.values, curve.run in with_evaluation) for curve in trained
    ] + evaluated


def exponential(losses: Sequence[Curve]) -> list[Curve]:
    """Perplexities; where a loss is beyond what a float holds there is a gap."""
    found = []
    for curve in losses:
        with np.errstate(over="ignore"):
            values = np.exp(curve.values)
        values[~np.isfinite(values)] = np.nan
        found.append(Curve(curve.run, curve.name, curve.steps, values, curve.faint))
    return found


def norm_panel(runs: Sequence[Run], points: int) -> Panel:
    """Gradient norms before stabilising (the largest between two logs where known) and after, spikes and resets."""
    found, marks = [], []
    for i, run in enumerate(runs):
        key = next((k for k in ("gradients/norm_max", "gradients/norm", "grad_norm") if run.series(k)[0]), None)
        if key is None:
            continue
        steps, values = run.series(key)
        before = "largest since the last log" if key.endswith("max") else "before stabilising"
        found.append(Curve(i, before, *thinned(steps, values, points)))
        stable_steps, stable_values = run.series("gradients/stable_norm")
        if stable_steps:
            found.append(Curve(i, "after stabilising", *thinned(stable_steps, stable_values, points), faint=True))
        spikes = spike_texts(run)
        resets = {step: "" for key in RESET_KEYS for step, count in zip(*run.series(key), strict=True) if count > 0}
        for name, symbol, at in (("spike", "triangle", spikes), ("reset", "diamond", resets)):
            if at:
                height = np.interp(list(at), steps, values)
                x, y = np.asarray(list(at), np.float32), height.astype(np.float32)
                marks.append(Marks(i, name, x, y, symbol, list(at.values())))
    return Panel("gradient_norm", "Gradient norm", "L2 norm", found, log=True, marks=marks)


def clipped_curves(runs: Sequence[Run], points: int) -> tuple[str, str, list[Curve]]:
    """Title, unit and curves of what AdaClip scaled down: the share where it is known, otherwise the number."""
    shares = curves(runs, "gradients/clipped_share", "clipped", points)
    if shares:
        return "Clipped entries", "share of all entries", shares
    return "Clipped entries", "entries since the last log", curves(runs, "gradients/clipped", "clipped", points)


def spike_name(spike: Mapping[str, Any]) -> str:
    """The tensor that spiked, and how many times the usual its largest entry was."""
    score = spike.get("score")
    return str(spike.get("tensor", "?")) + (f" ×{score:.3g}" if is_number(score) else "")


def spike_texts(run: Run) -> dict[float, str]:
    """For each step with recorded spikes the names of the tensors, the worst first, and their scores."""
    by_step: dict[float, list[dict[str, Any]]] = {}
    for spike in run.spikes:
        by_step.setdefault(spike["step"], []).append(spike)
    texts = {}
    for step, spikes in sorted(by_step.items()):
        scored = sorted(spikes, key=lambda spike: -spike["score"] if is_number(spike.get("score")) else -math.inf)
        names = [spike_name(spike) for spike in scored]
        texts[step] = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return texts


def thinned(steps: Sequence[float], values: Sequence[float], points: int) -> tuple[np.ndarray, np.ndarray]:
    """At most about `points` points: of each stretch of the curve its smallest and its largest, so no spike is lost."""
    x, y = np.asarray(steps, np.float32), np.asarray(values, np.float64)
    y[~np.isfinite(y)] = np.nan
    if len(x) > points:
        stretches = np.array_split(np.arange(len(x)), max(1, points // 2))
        kept = {0, len(x) - 1}
        for stretch in stretches:
            numbers = stretch[np.isfinite(y[stretch])]
            # A stretch without a number stays as a gap.
            chosen = (numbers[y[numbers].argmin()], numbers[y[numbers].argmax()]) if len(numbers) else stretch[:1]
            kept.update(int(index) for index in chosen)
        order = sorted(kept)
        x, y = x[order], y[order]
    with np.errstate(over="ignore"):
        return x, y.astype(np.float32)


def heat_maps(runs: Sequence[Run], cells: int) -> list[HeatMap]:
    """Norms by block for each run that logged them; a column is the largest of the logs that fall into it.

    Args:
        runs: the runs.
        cells: the most cells that one map may have.
    """
    return [found for i, run in enumerate(runs) if (found := heat_map(i, run, cells)) is not None]


def heat_map(index: int, run: Run, cells: int) -> HeatMap | None:
    """The heat map of one run; None where it logged no norms by block."""
    keys = dict.fromkeys(key for row in run.rows for key in row)
    prefix = next((found for found in BLOCK_PREFIXES if any(key.startswith(found) for key in keys)), None)
    if prefix is None:
        return None
    names = [key for key in keys if key.startswith(prefix)]
    logs = {row["step"]: row for row in run.rows if any(name in row for name in names)}
    steps = sorted(logs)
    grid = np.array([[logs[step].get(name, math.nan) for step in steps] for name in names], np.float32)
    columns = max(1, min(len(steps), cells // len(names)))
    parts = np.array_split(grid, columns, axis=1)
    # fmax leaves gaps out, and gives a gap where there is nothing else.
    norms = np.stack([np.fmax.reduce(part, axis=1) for part in parts], axis=1)
    norms[~np.isfinite(norms)] = np.nan
    return HeatMap(index, [name.removeprefix(prefix) for name in names], steps[0], steps[-1], norms)
