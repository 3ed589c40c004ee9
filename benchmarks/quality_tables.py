"""The tables of the quality benchmark, made from its record alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

from benchmarks.quality_methods import APART, WITHOUT_RESETS, apart
from benchmarks.quality_runs import TIED, Run
from benchmarks.quality_studies import (
    BASELINES,
    DEFAULT_RATE,
    STEPS_RATES,
    STUDIES,
    Record,
    best_apart,
    best_rate,
    loss_of,
    over_seeds,
)


class Summary(NamedTuple):
    """One setting over its seeds."""

    run: Run  # with the lowest seed
    losses: list[float]  # one for each seed, a divergence infinite

    @property
    def mean(self) -> float:
        return statistics.fmean(self.losses)

    @property
    def deviation(self) -> float:
        """Standard deviation over the seeds; nan for one seed or a divergence."""
        enough = len(self.losses) > 1 and math.isfinite(self.mean)
        return statistics.stdev(self.losses) if enough else math.nan


def summaries(runs: Iterable[Run], record: Record) -> list[Summary]:
    """The settings among these runs that are on record, the lowest mean first."""
    settings: dict[Run, list[float]] = {}
    for run in dict.fromkeys(runs):
        if run in record:
            settings.setdefault(replace(run, seed=0), []).append(loss_of(record, run))
    found = [Summary(setting, losses) for setting, losses in settings.items()]
    return sorted(found, key=lambda summary: summary.mean)


def markdown(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown; all columns but the first two are numbers."""
    names = list(columns)
    rule = ["---", "---", *["---:"] * (len(names) - 2)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (names, rule, *rows))


def number(value: float, digits: int = 3) -> str:
    """For a cell of a table."""
    if math.isnan(value):
        return "–"
    return "diverged" if math.isinf(value) else f"{value:.{digits}f}"


def table(study: str, base: Run, record: Record) -> str:
    """One study: mean, spread and perplexity of each setting."""
    rows = []
    for summary in summaries(STUDIES[study](base, record), record):
        run, losses = summary.run, summary.losses
        perplexity = math.exp(summary.mean) if summary.mean < 700 else math.inf
        where = "" if run.data == base.data else f" on {run.data}"
        where += ", tied" if run.model_size.endswith(TIED) else ""
        rows.append(
            (
                f"`{run.method}`{where}",
                run.precision,
                f"{run.learning_rate:g}",
                str(len(losses)),
                number(summary.mean),
                number(summary.deviation),
                number(min(losses)),
                number(max(losses)),
                number(perplexity, 1),
            )
        )
    columns = ("optimizer", "precision", "lr", "seeds", "loss", "± std", "lowest", "highest", "perplexity")
    return markdown(columns, rows)


def curve(row: Mapping[str, str]) -> list[tuple[int, float]]:
    """Steps and validation losses along a run."""
    points = (point.split(":") for point in row["curve"].split())
    return [(int(step), float(loss)) for step, loss in points]


def steps_to(loss: float, points: list[tuple[int, float]]) -> float:
    """Where a curve first falls to this loss, interpolated between its points; infinite if it never does."""
    before = None
    for step, value in points:
        if value <= loss:
            if before is None or before[1] == value:
                return step
            return before[0] + (step - before[0]) * (before[1] - loss) / (before[1] - value)
        before = (step, value)
    return math.inf


def steps_table(base: Run, record: Record) -> str:
    """The share of its steps that Stable-SPAM needs to each AdamW's final loss, seed by seed, all in INT4."""
    rows = []
    ours = _at_best(replace(base, method="stable_spam"), record)
    for method in BASELINES:
        theirs = _at_best(replace(base, method=method), record)
        pairs = [pair for pair in zip(theirs, ours, strict=True) if all(run in record for run in pair)]
        shares = [_share_of_steps(*(curve(record[run]) for run in pair)) for pair in pairs]
        if shares:
            each = ", ".join("never" if math.isinf(share) else f"{share:.2f}" for share in shares)
            rate = f"{theirs[0].learning_rate:g}"
            rows.append((f"`{method}`", rate, number(statistics.fmean(shares), 2).replace("diverged", "never"), each))
    return markdown(("AdamW", "lr", "share of the steps, mean", "of each seed"), rows)


def apart_table(base: Run, record: Record) -> str:
    """One learning rate for all tensors, and ten and thirty times as much for the embedding, INT4, the demo's rate."""
    rows = []
    for method, name in (("adamw_clipped", "AdamW + clipping"), ("stable_spam", "Stable-SPAM")):
        cells = []
        for each in (method, *(apart(method, "embedding", factor) for factor in (10, 30))):
            own = replace(base, method=each, precision="int4", learning_rate=DEFAULT_RATE)
            (found,) = summaries(over_seeds(own), record) or [None]
            cells.append("–" if found is None else _in_words(found))
        rows.append((name, "INT4", *cells))
    return markdown(("optimizer", "linear layers", "one learning rate", "embedding × 10", "embedding × 30"), rows)


def apart_summary(base: Run, record: Record) -> str:
    """Each optimizer at its own best, the embedding apart, in words."""
    found = {}
    for method in APART:
        best = best_apart(base, record, apart(method, "embedding", 10))
        if best is not None:
            (found[method],) = summaries(over_seeds(best), record)
    if APART[0] not in found or len(found) < 2:
        return "The runs at each optimizer's best rate of the matrices are not all on record."
    ours, theirs = found.pop(APART[0]), min(found.values(), key=lambda one: one.mean)
    losses = [_in_words(one, f"lr {one.run.learning_rate:g}, ") for one in (ours, theirs)]
    beta = 0.95 if "beta95" in theirs.run.method else 0.999
    decay = ", weight decay of 0.1" if theirs.run.method.endswith("decay") else ""
    return (
        "Each at its own best learning rate for the matrices, ten times that for the embedding, Stable-SPAM ends at "
        f"{losses[0]} and the best AdamW (clipping, β2 of {beta}{decay}) at {losses[1]}: "
        f"{theirs.mean - ours.mean:.3f} apart."
    )


def longer_summary(base: Run, record: Record) -> str:
    """The larger model's losses in INT4, each method at its better rate, in words."""
    names = {
        apart(APART[0], "embedding", 10): "Stable-SPAM",
        WITHOUT_RESETS: "Stable-SPAM without its resets",
        apart(APART[1], "embedding", 10): "AdamW (clipping, β2 of 0.999)",
        apart(APART[2], "embedding", 10): "AdamW with β2 of 0.95",
    }
    found = [one for one in summaries(STUDIES["longer"](base, record), record) if one.run.precision == "int4"]
    ends = []
    for method, name in names.items():
        own = [one for one in found if one.run.method == method]
        if own:
            lowest = min(own, key=lambda one: one.mean)
            ends.append(f"{_in_words(lowest, f'lr {lowest.run.learning_rate:g}, ')} with {name}")
    return (
        "A model of 9 million parameters ends after 2,000 steps in INT4, at the better of two learning rates, at "
        f"{', '.join(ends)}."
    )


def _in_words(one: Summary, setting: str = "") -> str:
    spread = f" ± {one.deviation:.3f}" if len(one.losses) > 1 else ""
    seeds = f"{len(one.losses)} seed{'s' * (len(one.losses) > 1)}"
    return f"{number(one.mean)}{spread} ({setting}{seeds})"


def fewer_table(base: Run, record: Record) -> str:
    """What whole runs of fewer steps end at, beside the Trainer's default and the best AdamW in all steps, INT4."""
    goals = [replace(base, method="adamw_clipped", precision="int4", learning_rate=DEFAULT_RATE)]
    bests = [best for method in APART[1:] if (best := best_apart(base, record, apart(method, "embedding", 10)))]
    goals += sorted(bests, key=lambda run: loss_of(record, run))[:1]
    rows = [_fewer_row(found, base) for goal in goals for found in summaries(over_seeds(goal), record)]
    runs = STUDIES["fewer_steps"](base, record)
    rows += [_fewer_row(found, base) for found in summaries(runs, record)]
    return markdown(("optimizer", "lr", "steps", "seeds", "loss", "± std"), rows)


def _fewer_row(found: Summary, base: Run) -> tuple[str, ...]:
    run, share = found.run, found.run.steps / base.steps
    counts = f"{run.steps} ({share:g})", str(len(found.losses))
    return f"`{run.method}`", f"{run.learning_rate:g}", *counts, number(found.mean), number(found.deviation)


def _at_best(base: Run, record: Record) -> list[Run]:
    """One run for each seed, at the best of the learning rates of the study `steps`."""
    own = replace(base, precision="int4")
    rate = best_rate(record, own, STEPS_RATES)
    return over_seeds(replace(own, learning_rate=rate or math.nan))


def _share_of_steps(theirs: list[tuple[int, float]], ours: list[tuple[int, float]]) -> float:
    return steps_to(theirs[-1][1], ours) / theirs[-1][0]


def tables(studies: list[str], base: Run, record: Record) -> str:
    """The studies one after the other, each under its question."""
    parts = [f"### {name}\n\n{STUDIES[name].__doc__}\n\n{table(name, base, record)}\n" for name in studies]
    if "steps" in studies:
        parts.append(f"{steps_table.__doc__}\n\n{steps_table(base, record)}\n")
    return "\n".join(parts)
