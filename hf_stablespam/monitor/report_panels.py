"""From runs to what a report shows: curves, marks, heat maps and tables, as plain data for any plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from hf_stablespam.monitor.report_runs import Run

BLOCK_PREFIX = "gradients/norm/"
# Hyperparameters shown even where all runs agree on them; others only where they differ.
ALWAYS_SHOWN = (
    "optim",
    "optim_args",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "weight_decay",
    "max_grad_norm",
    "seed",
)
SIGNS = {"circle": "●", "triangle": "▲", "diamond": "◆"}
NEVER_SHOWN = frozenset({"output_dir", "logging_dir", "run_name", "resume_from_checkpoint", "hub_model_id"})


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
    """Single steps of a run that are pointed out, such as spikes and resets."""

    run: int
    name: str
    steps: np.ndarray
    values: np.ndarray
    symbol: str = "circle"


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


@dataclass(frozen=True)
class Table:
    """A table with a heading for each row and column; `marked` rows stand out."""

    title: str
    columns: list[str]
    rows: list[tuple[str, list[str]]]
    marked: frozenset[str] = frozenset()
    note: str = ""


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
        Panel("learning_rate", "Learning rate", "", curves(runs, "learning_rate", "learning rate", points)),
        Panel("throughput", "Throughput", "tokens per second", throughput_curves(runs, points)),
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
        spiked = [spike["step"] for spike in run.spikes]
        resets = [step for step, count in zip(*run.series("gradients/resets"), strict=True) if count > 0]
        for name, symbol, at in (("spike", "triangle", spiked), ("reset", "diamond", resets)):
            if at:
                height = np.interp(at, steps, values)
                marks.append(Marks(i, name, np.asarray(at, np.float32), height.astype(np.float32), symbol))
    return Panel("gradient_norm", "Gradient norm", "L2 norm", found, log=True, marks=marks)


def clipped_curves(runs: Sequence[Run], points: int) -> tuple[str, str, list[Curve]]:
    """Title, unit and curves of what AdaClip scaled down: the share where it is known, otherwise the number."""
    shares = curves(runs, "gradients/clipped_share", "clipped", points)
    if shares:
        return "Clipped entries", "share of all entries", shares
    return "Clipped entries", "entries since the last log", curves(runs, "gradients/clipped", "clipped", points)


def throughput_curves(runs: Sequence[Run], points: int) -> list[Curve]:
    """Tokens per second along the run, where `include_num_input_tokens_seen` made the Trainer log them."""
    return curves(runs, "train_tokens_per_second", "tokens per second", points)


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
    names = dict.fromkeys(key for row in run.rows for key in row if key.startswith(BLOCK_PREFIX))
    logs = {row["step"]: row for row in run.rows if any(name in row for name in names)}
    if not names:
        return None
    steps = sorted(logs)
    grid = np.array([[logs[step].get(name, math.nan) for step in steps] for name in names], np.float32)
    columns = max(1, min(len(steps), cells // len(names)))
    parts = np.array_split(grid, columns, axis=1)
    # fmax leaves gaps out, and gives a gap where there is nothing else.
    norms = np.stack([np.fmax.reduce(part, axis=1) for part in parts], axis=1)
    norms[~np.isfinite(norms)] = np.nan
    return HeatMap(index, [name.removeprefix(BLOCK_PREFIX) for name in names], steps[0], steps[-1], norms)


def final_loss(run: Run) -> tuple[str, float] | None:
    """Key and value of the loss a run ended with: the validation loss, or else the last logged training loss."""
    for key in ("eval_loss", "loss"):
        value = run.last(key)
        if value is not None:
            return key, value
    return None


def steps_to_reach(run: Run, key: str, loss: float) -> float | None:
    """The first logged step whose loss is at most `loss`; None when no log got there."""
    steps, values = run.series(key)
    return next((step for step, value in zip(steps, values, strict=True) if value <= loss), None)


def summary_table(runs: Sequence[Run]) -> Table:
    """What each run ended with."""
    rows = [
        ("last step", [number(run.last("step")) for run in runs]),
        ("validation loss", [number(run.last("eval_loss"), 4) for run in runs]),
        ("perplexity", [number(perplexity(run), 4) for run in runs]),
        ("training loss", [number(run.last("loss"), 4) for run in runs]),
        ("seconds", [number(run.last("train_runtime"), 4) for run in runs]),
        ("samples per second", [number(run.last("train_samples_per_second"), 4) for run in runs]),
        ("spikes recorded", [number(len(run.spikes)) if run.spikes else "–" for run in runs]),
    ]
    kept = [row for row in rows if any(cell != "–" for cell in row[1])]
    return Table("Where the runs ended", [run.label for run in runs], kept)


def perplexity(run: Run) -> float | None:
    """exp of the last validation loss."""
    loss = run.last("eval_loss")
    return None if loss is None or loss > 700 else math.exp(loss)


def reach_table(runs: Sequence[Run]) -> Table | None:
    """For every pair of runs the step at which the one reached the other's final loss; None for a single run."""
    ends = [final_loss(run) for run in runs]
    if len(runs) < 2 or not any(ends):
        return None
    rows = []
    for run in runs:
        cells = []
        for end in ends:
            reached = None if end is None else steps_to_reach(run, *end)
            cells.append("–" if end is None else "not reached" if reached is None else number(reached))
        rows.append((run.label, cells))
    columns = ["–" if end is None else f"{run.label}: {end[1]:.4g}" for run, end in zip(runs, ends, strict=True)]
    note = "The first logged step at which the run of the row had the final loss of the run of the column."
    return Table("Steps to reach a final loss", columns, rows, note=note)


def settings_table(runs: Sequence[Run]) -> Table:
    """Hyperparameters side by side: those that differ, marked, and the usual ones."""
    names = list(dict.fromkeys([*ALWAYS_SHOWN, *(name for run in runs for name in run.settings)]))
    differing = {name for name in names if len({run.settings.get(name) for run in runs if run.settings}) > 1}
    model = {name for name in names if name.startswith("model.")}
    known = {name for run in runs for name in run.settings}
    kept = [name for name in names if name in known - NEVER_SHOWN and name in differing | model | set(ALWAYS_SHOWN)]
    rows = [(name, [run.settings.get(name, "–") for run in runs]) for name in kept]
    marked = frozenset(name for name in kept if name in differing)
    note = "Marked: settings in which the runs differ." if marked else ""
    return Table("Settings", [run.label for run in runs], rows, marked, note)


def number(value: float | None, digits: int = 6) -> str:
    """A number for a table; a dash where there is none."""
    return "–" if value is None else f"{value:,.{digits}g}" if abs(value) < 1e6 else f"{value:,.0f}"
