"""A report's diagrams as interactive figures, with Bokeh.

Bokeh because its script is the smallest of the libraries that run without a network: 1.3 MB inside the file, against
4.8 MB of Plotly (beside which little data fits into the 6 MB that a report may weigh) and Vega-Altair, which needs
one more package, with a JavaScript engine, to put its scripts into the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from bokeh.embed import components
from bokeh.models import (
    ColumnDataSource,
    DataRange1d,
    FixedTicker,
    HoverTool,
    LogColorMapper,
    NumeralTickFormatter,
    Range1d,
)
from bokeh.models.annotations import ColorBar
from bokeh.palettes import Viridis256
from bokeh.plotting import figure
from bokeh.resources import Resources

from hf_stablespam.monitor.report.panels import Curve, HeatMap, Marks, Panel
from hf_stablespam.monitor.report.style import color, dash

TOOLS = "xbox_zoom,pan,xwheel_zoom,reset,save"
HEIGHT = 320
ROW_HEIGHT = 14  # of a heat map, in pixels


def library() -> str:
    """The `<script>` element that holds Bokeh itself."""
    return Resources(mode="inline", components=["bokeh"]).render_js()


def embed(panels: Sequence[Panel], maps: Sequence[HeatMap], labels: Sequence[str]) -> tuple[str, list[str], list[str]]:
    """All diagrams as one script, and the element that each goes into: of the panels, and of the heat maps."""
    if not panels and not maps:
        return "", [], []
    shared = steps_range(panels, maps)
    plots = [panel_figure(panel, labels, shared) for panel in panels]
    plots += [heat_map_figure(found, labels, shared) for found in maps]
    script, elements = components(plots)
    return script, list(elements[: len(panels)]), list(elements[len(panels) :])


def steps_range(panels: Sequence[Panel], maps: Sequence[HeatMap]) -> Range1d:
    """From the first to the last step of all diagrams, which share it: zooming in one zooms all."""
    steps = [float(step) for panel in panels for curve in panel.curves for step in curve.steps[[0, -1]]]
    steps += [step for found in maps for step in (found.first_step, found.last_step)]
    room = 0.02 * (max(steps) - min(steps)) or 1.0
    return Range1d(start=min(steps) - room, end=max(steps) + room, bounds="auto")


def empty_figure(shared: Range1d, name: str, **options: Any) -> figure:
    """What all diagrams have in common."""
    plot = figure(
        sizing_mode="stretch_width",
        tools=TOOLS,
        active_drag="xbox_zoom",
        toolbar_location="above",
        x_range=shared,
        name=name,
        **options,
    )
    plot.toolbar.logo = None
    # Transparent from the first stroke: clearing a canvas leaves a rim of what was painted before.
    plot.background_fill_color = plot.border_fill_color = plot.outline_line_color = None
    plot.xaxis.formatter = NumeralTickFormatter(format="0,0")
    plot.xgrid.grid_line_color = None
    return plot


def panel_figure(panel: Panel, labels: Sequence[str], shared: Range1d) -> figure:
    """One diagram over the update steps."""
    scale = "log" if panel.log else "linear"
    plot = empty_figure(
        shared, panel.key, height=HEIGHT, y_axis_type=scale, y_axis_label=panel.unit or None, window_axis="x"
    )
    # A diagram of a constant reaches from nothing to twice its value.
    span = 2 * float(np.nanmax(np.abs(panel.curves[0].values), initial=0)) or 2
    plot.y_range = DataRange1d(only_visible=True, default_span=span)
    lines = [add_curve(plot, curve, labels, panel.log) for curve in panel.curves]
    marks = [add_marks(plot, found, labels) for found in panel.marks]
    tooltips = [("", "$name"), ("step", "@x{%d}"), ("value", "@y{%.4g}")]
    plot.add_tools(hover(tooltips, lines))
    if marks:
        plot.add_tools(hover([*tooltips[:2], ("", "@text")], marks))
    return plot


def hover(tooltips: list[tuple[str, str]], renderers: list[Any]) -> HoverTool:
    """A tooltip whose numbers are formatted as in C."""
    formats: Any = dict.fromkeys(("@x", "@y", "$x", "@image"), "printf")
    return HoverTool(tooltips=tooltips, formatters=formats, renderers=renderers, line_policy="nearest")


def add_curve(plot: figure, curve: Curve, labels: Sequence[str], log: bool) -> Any:
    """One line. A logarithmic axis has no place for what is not positive: a gap."""
    values = np.where(curve.values > 0, curve.values, np.float32("nan")) if log else curve.values
    line = plot.line(
        "x",
        "y",
        source=ColumnDataSource({"x": curve.steps, "y": values}),
        color=color(curve.run),
        line_dash=dash(curve.run),
        line_width=1.2 if curve.faint else 2,
        line_alpha=0.45 if curve.faint else 1.0,
    )
    tag(line, curve.run, curve.name, labels)
    # A line of one point is not seen.
    if len(curve.steps) == 1:
        add_marks(plot, Marks(curve.run, curve.name, curve.steps, values), labels)
    return line


def add_marks(plot: figure, marks: Marks, labels: Sequence[str]) -> Any:
    """Symbols on a run's curve."""
    drawn = plot.scatter(
        "x",
        "y",
        source=ColumnDataSource({"x": marks.steps, "y": marks.values, "text": marks.texts or [""] * len(marks.steps)}),
        marker=marks.symbol,
        size=9,
        fill_color=color(marks.run),
        line_color="#808080",
    )
    return tag(drawn, marks.run, marks.name, labels)


def tag(drawn: Any, run: int, name: str, labels: Sequence[str]) -> Any:
    """Name a renderer for its tooltip, and mark whose it is for the page's script, which shows and hides runs."""
    drawn.name = f"{labels[run]}, {name}"
    drawn.tags = ["run", run]
    return drawn


def heat_map_figure(found: HeatMap, labels: Sequence[str], shared: Range1d) -> figure:
    """Norm by block and step, on a logarithmic colour scale."""
    rows, _ = found.norms.shape
    positive = found.norms[found.norms > 0]
    low, high = (float(positive.min()), float(positive.max())) if positive.size else (0.1, 1.0)
    plot = empty_figure(
        shared,
        f"blocks-{found.run}",
        height=90 + max(ROW_HEIGHT * rows, 120),
        y_range=(0, rows),
        x_axis_label=None,
    )
    mapper = LogColorMapper(palette=list(Viridis256), low=low, high=max(high, low * 1.001), nan_color="#80808040")
    image = plot.image(
        image=[found.norms],
        x=found.first_step,
        y=0,
        dw=max(found.last_step - found.first_step, 1),
        dh=rows,
        color_mapper=mapper,
        name=f"{labels[found.run]}",
    )
    plot.yaxis.ticker = FixedTicker(ticks=[row + 0.5 for row in range(rows)])
    plot.yaxis.major_label_overrides = {row + 0.5: name for row, name in enumerate(found.blocks)}
    plot.ygrid.grid_line_color = None
    plot.add_layout(ColorBar(color_mapper=mapper, width=10, background_fill_color=None), "right")
    tooltips = [("step", "$x{%d}"), ("norm", "@image{%.4g}")]
    plot.add_tools(hover(tooltips, [image]))
    return plot
