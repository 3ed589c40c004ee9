"""The tables and the figure of the real model's study, made from its rows alone.

python benchmarks/qat_tables.py            # docs/images/qat-smollm2.png
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import _record
from benchmarks.qat_record import (
    FORMATS,
    FULL,
    GGUF,
    LOADED,
    LONGER,
    NAME,
    STEPS,
    Record,
    Run,
    perplexity_of,
    read_record,
)

IMAGES = Path(__file__).parents[1] / "docs" / "images"
LABELS = {"adamw_clipped": "AdamW + clipping", "stable_spam": "Stable-SPAM"}
COLORS = {"adamw_clipped": "#E69F00", "stable_spam": "#0072B2"}
TITLES = {
    GGUF: "int4_signed, groups of 32",
    "w4a4_int4_g64": "int4, weights and inputs, groups of 64",
    "nvfp4": "NVFP4, weights and inputs",
    "mxfp4": "MXFP4, weights and inputs",
}
LENGTHS = (STEPS, round(LONGER * STEPS))
WAYS: dict[str, tuple[str, str, str | None]] = {  # → optimizer, format in training, format that comes afterwards
    "fine-tuned in full precision": ("adamw_clipped", FULL, None),
    "the same, then rounded to 4 bits": ("adamw_clipped", FULL, GGUF),
    **{f"trained in 4 bits, {label}": (method, GGUF, None) for method, label in LABELS.items()},
}
TICKS = {  # W: weights, A: inputs, g: numbers that share a scale
    GGUF: "int4_signed\nW4 g32",
    "w4a4_int4_g64": "int4\nW4A4 g64",
    "nvfp4": "NVFP4\nW4A4",
    "mxfp4": "MXFP4\nW4A4",
}


def of_setting(record: Record, method: str, precision: str, steps: int = STEPS) -> dict[float, list[Run]]:
    """Learning rate → the runs on record, one for each seed."""
    found: dict[float, list[Run]] = {}
    for run in record:
        if (run.method, run.precision, run.steps) == (method, precision, steps):
            found.setdefault(run.learning_rate, []).append(run)
    return found


def best(record: Record, method: str, precision: str, then: str | None = None, steps: int = STEPS) -> list[Run]:
    """The runs at the learning rate whose first seed ended lowest, by seed; empty where there is none.

    With `then` those of full precision whose first seed was lowest after rounding to this format.
    """
    found = of_setting(record, method, precision, steps)
    if not found:
        return []
    first = {rate: min(runs, key=lambda run: run.seed) for rate, runs in found.items()}
    rate = min(first, key=lambda rate: end_of(record, first[rate], then))
    return sorted(found[rate], key=lambda run: run.seed)


def end_of(record: Record, run: Run, then: str | None = None) -> float:
    """Perplexity at the end of a run, or after rounding what it trained."""
    return perplexity_of(record, run) if then is None else rounded(record, run, then)


def rounded(record: Record, run: Run, precision: str) -> float:
    """Perplexity of a run in full precision after rounding."""
    return float(record[run][f"rounded_{precision}"])


def spread(values: Iterable[float]) -> str:
    """Mean and standard deviation; one value alone."""
    numbers = list(values)
    if not numbers:
        return "–"
    mean = f"{statistics.fmean(numbers):.2f}"
    return f"{mean} ± {statistics.stdev(numbers):.2f}" if len(numbers) > 1 else mean


def summary(record: Record) -> str:
    """The main result, made from the rows alone: what each way ends at, after few steps and after more."""
    loaded = Run(LOADED, FULL, 0.0, steps=0)
    ways = {steps: [best(record, *way, steps) for way in WAYS.values()] for steps in LENGTHS}
    rows = [f"| | {' | '.join(f'{steps} steps' for steps in LENGTHS)} |", f"|---|{'---:|' * len(LENGTHS)}"]
    for place, (name, (_, _, then)) in enumerate(WAYS.items()):
        cells = [_cell(record, ways[steps][place], then) for steps in LENGTHS]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    taken = []
    for steps, found in ways.items():
        ends = [_mean(record, runs, then) for runs, (_, _, then) in zip(found, WAYS.values(), strict=True)]
        shares = [100 * (ends[1] - end) / (ends[1] - ends[0]) for end in ends[2:]]
        if all(map(math.isfinite, shares)):
            said = (f"{share:.0f} % ({label})" for share, label in zip(shares, LABELS.values(), strict=True))
            taken.append(f"{' and '.join(said)} after {steps} steps")
    return "\n".join(
        [
            f"Perplexity of {record[loaded]['tokens']} tokens of held-out pages, in brackets the learning rate that was"
            f" best on the first seed. The loaded model has {perplexity_of(record, loaded):.2f}, and"
            f" {rounded(record, loaded, GGUF):.2f} once its matrices are rounded to 4 bits.\n",
            *rows,
            f"\nOf what rounding costs after fine-tuning, training in the format takes away {', '.join(taken)}.",
        ]
    )


def _mean(record: Record, runs: list[Run], then: str | None = None) -> float:
    """Perplexity over the seeds; not a number where there is none."""
    return statistics.fmean(end_of(record, run, then) for run in runs) if runs else math.nan


def seeds_of(runs: list[Run]) -> str:
    return f"{len(runs)} seed{'s' * (len(runs) != 1)}"


def table(record: Record) -> str:
    """Markdown: one row for each format, the perplexity of each way to it."""
    loaded = Run(LOADED, FULL, 0.0, steps=0)
    names = (
        "format",
        "as loaded, rounded",
        "fine-tuned in full precision, then rounded",
        *(f"trained in it, {LABELS[m]}" for m in LABELS),
    )
    rows = [f"| {' | '.join(names)} |", f"|---|{'---:|' * (len(names) - 1)}"]
    cells = [
        f"{perplexity_of(record, loaded):.2f}",
        "–",
        *(_cell(record, best(record, method, FULL)) for method in LABELS),
    ]
    rows.append(f"| full precision | {' | '.join(cells)} |")
    for precision, title in TITLES.items():
        after = _cell(record, best(record, "adamw_clipped", FULL, precision), precision)
        trained = [_cell(record, best(record, method, precision)) for method in LABELS]
        cells = [f"{rounded(record, loaded, precision):.2f}", after, *trained]
        rows.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _cell(record: Record, runs: list[Run], then: str | None = None) -> str:
    """What runs that differ in their seeds end at, and in brackets their learning rate."""
    ends = spread(end_of(record, run, then) for run in runs)
    return f"{ends} ({runs[0].learning_rate:g}, {seeds_of(runs)})" if runs else ends


def rates_table(record: Record) -> str:
    """Markdown: every learning rate that was tried, first seeds."""
    known = [(m, p, n) for n in LENGTHS for p in (*FORMATS, FULL) for m in LABELS if of_setting(record, m, p, n)]
    rates = sorted({rate for setting in known for rate in of_setting(record, *setting)})
    rows = [f"| steps | optimizer | trained in | {' | '.join(f'{rate:g}' for rate in rates)} |"]
    rows.append(f"|---:|---|---|{'---:|' * len(rates)}")
    for method, precision, steps in known:
        found = of_setting(record, method, precision, steps)
        firsts = [min(found[rate], key=lambda run: run.seed) if rate in found else None for rate in rates]
        values = ["–" if run is None else f"{perplexity_of(record, run):.2f}" for run in firsts]
        title = TITLES.get(precision, "full precision")
        rows.append(f"| {steps} | {LABELS[method]} | {title} | {' | '.join(values)} |")
    return "\n".join(rows)


def files_table() -> str:
    """Markdown: what llama.cpp makes of the trained files."""
    path = _record.RESULTS / f"{NAME}_gguf.csv"
    rows = list(csv.DictReader(path.open(newline=""))) if path.exists() else []
    lines = ["| run | rounded before | torch | llama.cpp | difference | MB |", "|---|---:|---:|---:|---:|---:|"]
    for row in rows:
        what = f"`{row['method']}`" if "/" in row["method"] else f"{LABELS[row['method']]}, {row['learning_rate']}"
        what += f", {row['steps']} steps"
        before, off = row.get("perplexity_rounded") or "–", f"{float(row['off_percent']):+.2f} %"
        numbers = (before, row["perplexity_torch"], row["perplexity_llama_cpp"], off, row["megabytes"])
        lines.append(f"| {what} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def curve(record: Record, run: Run) -> list[tuple[int, float]]:
    """Steps and perplexities along a run, from before its first step."""
    loaded = Run(LOADED, FULL, 0.0, steps=0)
    first = perplexity_of(record, loaded) if run.precision == FULL else rounded(record, loaded, run.precision)
    points = (point.split(":") for point in record[run]["curve"].split())
    return [(0, first), *((int(step), math.exp(float(loss))) for step, loss in points)]


def figure(record: Record) -> plt.Figure:
    """Left: perplexity over steps, with lines of full precision and of rounding afterwards; right: rounding's cost."""
    drawing, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    steps = max((n for n in LENGTHS if all(of_setting(record, m, GGUF, n) for m in LABELS)), default=STEPS)
    for method, label in LABELS.items():
        for index, run in enumerate(best(record, method, GGUF, steps=steps)):
            text = f"trained in 4 bits, {label}" if index == 0 else None
            left.plot(*zip(*curve(record, run), strict=True), color=COLORS[method], label=text, marker="o", ms=3)
    if of_setting(record, "adamw_clipped", FULL, steps):
        full = _mean(record, best(record, "adamw_clipped", FULL, steps=steps))
        after = _mean(record, best(record, "adamw_clipped", FULL, GGUF, steps), GGUF)
        left.axhline(after, color="#D55E00", linestyle=":", label=f"fine-tuned, then rounded: {after:.1f}")
        left.axhline(full, color="#555555", linestyle="--", label=f"fine-tuned in full precision: {full:.1f}")
        left.set_ylim(bottom=full - 1)
    left.set(xlabel="update step", ylabel="perplexity of held-out pages", title=f"SmolLM2-135M, {TITLES[GGUF]}")
    left.grid(alpha=0.3)
    left.legend(fontsize="small")
    _bars(right, record, best(record, "adamw_clipped", FULL))
    return drawing


def _bars(axes: plt.Axes, record: Record, tuned: list[Run]) -> None:
    loaded = Run(LOADED, FULL, 0.0, steps=0)
    plain = perplexity_of(record, loaded)
    full = _mean(record, tuned)
    afterwards = [_mean(record, best(record, "adamw_clipped", FULL, p), p) for p in TITLES]
    ways: dict[str, tuple[str, list[float]]] = {
        "loaded, rounded": ("#999999", [rounded(record, loaded, p) - plain for p in TITLES]),
        "fine-tuned, rounded": ("#D55E00", [after - full for after in afterwards]),
    }
    for method, label in LABELS.items():
        costs = [_mean(record, best(record, method, precision)) - full for precision in TITLES]
        ways[f"trained in it, {label}"] = (COLORS[method], costs)
    for place, (label, (color, costs)) in enumerate(ways.items()):
        positions = [index + 0.2 * (place - 1.5) for index in range(len(costs))]
        bars = axes.bar(positions, costs, 0.2, color=color, label=label)
        axes.bar_label(bars, [f"{cost:.1f}" if math.isfinite(cost) else "" for cost in costs], fontsize=7, padding=1)
    axes.set_xticks(range(len(TITLES)), TICKS.values(), fontsize=9)
    axes.set(
        ylabel="perplexity above full precision", title=f"What the rounding costs after {STEPS} steps", yscale="log"
    )
    axes.set_ylim(1, 5 * axes.get_ylim()[1])
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize="small", loc="upper left", ncols=2)


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=IMAGES, help="folder of the image")
    options = parser.parse_args(command_line)
    options.output.mkdir(parents=True, exist_ok=True)
    drawing = figure(read_record())
    drawing.savefig(options.output / f"{NAME.replace('_', '-')}.png", dpi=120, metadata={"Software": None})
    plt.close(drawing)


if __name__ == "__main__":
    main()
