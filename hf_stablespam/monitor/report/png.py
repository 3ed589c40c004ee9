"""A report's diagrams as static pictures, with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from hf_stablespam._atomic import atomic_file
from hf_stablespam.monitor.report.panels import HeatMap, Panel
from hf_stablespam.monitor.report.style import MATPLOTLIB_DASHES, color, dash

SYMBOLS = {"circle": "o", "triangle": "^", "diamond": "D"}


def write_pictures(panels: Sequence[Panel], maps: Sequence[HeatMap], labels: Sequence[str], stem: Path) -> list[Path]:
    """One PNG for each diagram, called `<stem>-<diagram>.png`; returns their paths."""
    drawn = [(panel.key, panel_figure(panel, labels)) for panel in panels]
    drawn += [(f"blocks-{found.run + 1}", heat_map_figure(found, labels)) for found in maps]
    paths = []
    for key, figure in drawn:
        paths.append(stem.with_name(f"{stem.name}-{key}.png"))
        with atomic_file(paths[-1]) as partial:
            figure.savefig(partial, dpi=150, format="png")
    return paths


def empty_figure(height: float) -> Figure:
    """A figure of its own, not pyplot's: that would keep it, and choose a window system."""
    figure = Figure(figsize=(8, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plain(text: str) -> str:
    """Text in which matplotlib finds no formula: a run's name may hold dollar signs."""
    return text.replace("$", r"\$")


def panel_figure(panel: Panel, labels: Sequence[str]) -> Figure:
    """One diagram over the update steps; the legend names each run once."""
    figure = empty_figure(4.5)
    axes = figure.subplots()
    named: set[int] = set()
    for curve in sorted(panel.curves, key=lambda curve: curve.faint):
        axes.plot(
            curve.steps,
            curve.values,
            color=color(curve.run),
            linestyle=MATPLOTLIB_DASHES[dash(curve.run)],
            linewidth=1 if curve.faint else 1.8,
            alpha=0.4 if curve.faint else 1,
            marker="o" if len(curve.steps) == 1 else None,
            label=None if curve.run in named else plain(labels[curve.run]),
        )
        named.add(curve.run)
    for marks in panel.marks:
        axes.plot(marks.steps, marks.values, SYMBOLS[marks.symbol], color=color(marks.run), markeredgecolor="#808080")
    if panel.log:
        axes.set_yscale("log")
    axes.set_title(panel.title, loc="left")
    axes.set_xlabel(f"update step\n{panel.note}" if panel.note else "update step")
    axes.set_ylabel(panel.unit)
    figure.legend(loc="outside upper left", frameon=False, ncols=2)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def heat_map_figure(found: HeatMap, labels: Sequence[str]) -> Figure:
    """Norm by block and step."""
    rows = len(found.blocks)
    figure = empty_figure(1.5 + 0.2 * max(rows, 8))
    axes = figure.subplots()
    positive = found.norms[found.norms > 0]
    low, high = (positive.min(), positive.max()) if positive.size else (0.1, 1.0)
    norms = np.ma.masked_where(~(found.norms > 0), found.norms)
    extent = (found.first_step, max(found.last_step, found.first_step + 1), 0, rows)
    image = axes.imshow(
        norms,
        aspect="auto",
        origin="lower",
        extent=extent,
        interpolation="nearest",
        norm=LogNorm(low, max(high, low * 1.001)),
    )
    axes.set_yticks([row + 0.5 for row in range(rows)], map(plain, found.blocks), fontsize=7)
    axes.set_title(f"Gradient norm by block: {plain(labels[found.run])}", loc="left")
    axes.set_xlabel("update step")
    figure.colorbar(image, ax=axes)
    return figure
