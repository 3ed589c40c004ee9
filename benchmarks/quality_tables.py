"""The tables of the quality benchmark, made from its record alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from benchmarks.quality_runs import Run
from benchmarks.quality_studies import STUDIES, Record, loss_of


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


def tables(studies: list[str], base: Run, record: Record) -> str:
    """The studies one after the other, each under its question."""
    parts = [f"### {name}\n\n{STUDIES[name].__doc__}\n\n{table(name, base, record)}\n" for name in studies]
    return "\n".join(parts)
