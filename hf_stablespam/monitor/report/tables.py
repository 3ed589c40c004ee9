"""The tables of a report, as text: how the runs ended, how fast they got there, how they were set up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hf_stablespam.monitor.report.runs import Run

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
NEVER_SHOWN = frozenset({"output_dir", "logging_dir", "run_name", "resume_from_checkpoint", "hub_model_id"})


@dataclass(frozen=True)
class Table:
    """A table with a heading for each row and column; `marked` rows stand out, a `wide` one has no neighbour."""

    title: str
    columns: list[str]
    rows: list[tuple[str, list[str]]]
    marked: frozenset[str] = frozenset()
    note: str = ""
    wide: bool = False


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
    return Table("Settings", [run.label for run in runs], rows, marked, note, wide=True)


def number(value: float | None, digits: int = 6) -> str:
    """A number for a table; a dash where there is none."""
    return "–" if value is None else f"{value:,.{digits}g}" if abs(value) < 1e6 else f"{value:,.0f}"
