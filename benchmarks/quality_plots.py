"""The figures of the quality benchmark, drawn from its record.

python benchmarks/quality_plots.py            # writes them into docs/images
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.quality import read_record
from benchmarks.quality_methods import APART, METHODS, WITHOUT_RESETS, apart
from benchmarks.quality_runs import Run
from benchmarks.quality_studies import APART_RATES, DEFAULT_RATE, SEEDS, STUDIES, SWEPT, Record, loss_of
from benchmarks.quality_tables import curve

IMAGES = Path(__file__).parents[1] / "docs" / "images"
# The palette of Okabe and Ito, which the colour-blind can tell apart
COLORS = dict(zip(SWEPT, ("#E69F00", "#0072B2", "#999999", "#009E73", "#CC79A7", "#D55E00"), strict=True))
APART_COLORS = ("#0072B2", "#E69F00", "#D55E00")
LABELS = {
    "adamw_clipped": "AdamW + clipping",
    "stable_spam": "Stable-SPAM",
    "adamw": "AdamW",
    "spam": "SPAM",
    "adafactor": "Adafactor",
    "lion": "Lion",
    "adamw_clipped_beta95": "AdamW + clipping, β2 0.95",
}


def learning_rates(base: Run, record: Record) -> plt.Figure:
    """Final loss over the learning rate, per optimizer: INT4 left, full precision right."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    for axes, (precision, title) in zip(panels, (("int4", "INT4"), ("full", "full precision")), strict=True):
        for method in SWEPT:
            runs = [
                replace(base, method=method, precision=precision, learning_rate=rate) for rate in METHODS[method].rates
            ]
            points = [(run.learning_rate, loss_of(record, run)) for run in runs if run in record]
            finite = [point for point in points if math.isfinite(point[1])]
            axes.plot(*zip(*finite, strict=True), marker="o", label=LABELS[method], color=COLORS[method])
        axes.set(xscale="log", xlabel="learning rate", title=title)
        axes.set_xticks(METHODS["stable_spam"].rates, [f"{rate:g}" for rate in METHODS["stable_spam"].rates])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(f"validation loss after {base.steps} steps")
    panels[0].legend(fontsize="small")
    return figure


def curves(base: Run, record: Record) -> plt.Figure:
    """Validation loss over the steps of the demo's comparison, one line for each seed."""
    settings = (("stable_spam", "int4"), ("adamw_clipped", "full"), ("adamw_clipped", "int4"))
    styles = {"int4": "-", "full": "--"}
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    finals = []
    for method, precision in settings:
        runs = [
            replace(base, method=method, precision=precision, learning_rate=DEFAULT_RATE, seed=seed) for seed in SEEDS
        ]
        lines = [curve(record[run]) for run in runs if run in record]
        for index, line in enumerate(lines):
            label = f"{LABELS[method]}, {'INT4' if precision == 'int4' else 'full precision'}" if index == 0 else None
            axes.plot(*zip(*line, strict=True), styles[precision], color=COLORS[method], alpha=0.7, label=label)
        finals += [line[-1][1] for line in lines]
    if finals:
        mean = statistics.fmean(finals)
        axes.set_ylim(min(finals) - 0.1, mean + 1.2)
    axes.set(xlabel="update step", ylabel="validation loss")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def rates_apart(base: Run, record: Record) -> plt.Figure:
    """Final loss over the matrices' learning rate where the embedding has ten times as much, INT4, the first seed."""
    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    rates = APART_RATES
    for method, color in zip(APART, APART_COLORS, strict=True):
        for name, style, marker in ((apart(method, "embedding", 10), "-", "o"), (method, ":", "x")):
            runs = [replace(base, method=name, precision="int4", learning_rate=rate) for rate in rates]
            points = [(run.learning_rate, loss_of(record, run)) for run in runs if run in record]
            points = [point for point in points if math.isfinite(point[1])]
            label = LABELS[method] if style == "-" else f"{LABELS[method]}, one rate for all"
            if points:
                axes.plot(*zip(*points, strict=True), style, marker=marker, label=label, color=color)
    axes.set(xscale="log", xlabel="learning rate of the matrices", ylabel=f"validation loss after {base.steps} steps")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    return figure


def longer(base: Run, record: Record) -> plt.Figure:
    """Validation loss over the steps of the larger model, each run of the first seed a line."""
    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    names = {apart(method, "embedding", 10): LABELS[method] for method in APART}
    names[WITHOUT_RESETS] = f"{LABELS['stable_spam']} without resets"
    colors = dict(zip(names, (*APART_COLORS, "#009E73"), strict=True))
    runs = [run for run in STUDIES["longer"](base, record) if run in record and run.seed == SEEDS[0]]
    for run in runs:
        style = "--" if run.precision == "full" else "-" if run.learning_rate == DEFAULT_RATE else ":"
        precision = "full precision" if run.precision == "full" else "INT4"
        label = f"{names[run.method]}, {precision}, {run.learning_rate:g}"
        axes.plot(*zip(*curve(record[run]), strict=True), style, color=colors[run.method], label=label)
    if runs:
        axes.set_ylim(top=min(curve(record[run])[-1][1] for run in runs) + 1.2)
        figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    axes.set(xlabel="update step", ylabel="validation loss")
    axes.grid(alpha=0.3)
    return figure


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=IMAGES, help="folder of the images")
    parser.add_argument("--steps", type=int, default=500, help="of the runs that are drawn")
    options = parser.parse_args(command_line)
    record, base = read_record(), Run("stable_spam", "int4", DEFAULT_RATE, steps=options.steps)
    options.output.mkdir(parents=True, exist_ok=True)
    drawings = {"learning-rates": learning_rates, "steps": curves, "rates-apart": rates_apart, "longer": longer}
    for name, draw in drawings.items():
        figure = draw(base, record)
        figure.savefig(options.output / f"{name}.png", dpi=120, metadata={"Software": None})
        plt.close(figure)
        print(options.output / f"{name}.png")


if __name__ == "__main__":
    main()
