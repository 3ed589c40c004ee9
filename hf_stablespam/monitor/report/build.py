"""The report: one HTML file that compares Trainer runs, from what they left in their folders.

    python -m hf_stablespam report runs/adamw runs/stable_spam -o report.html

It opens without a network, and works for any Trainer run: one without our callbacks shows what it has.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_stablespam._atomic import atomic_file
from hf_stablespam.monitor.report.panels import heat_maps, panels
from hf_stablespam.monitor.report.run_tables import run_tables
from hf_stablespam.monitor.report.runs import Run, read_runs
from hf_stablespam.monitor.report.tables import reach_table, settings_table, summary_table

LARGEST = 6_000_000  # bytes of a report
POINTS = 2000  # of a curve, at first: twice what a wide screen shows
CELLS = 40_000  # of a heat map, at first


def write_report(paths: Sequence[str | Path], output: str | Path = "report.html", png: bool = False) -> list[Path]:
    """Write a report on the runs in `paths`.

    Args:
        paths: folders of runs, checkpoints, `trainer_state.json` files, or folders that hold runs.
        output: the HTML file to write.
        png: also write each diagram as a PNG beside it.

    Returns:
        The files that were written, the HTML file first.

    Raises:
        FileNotFoundError: a path does not exist or holds no run.
        ValueError: a run's file is broken, a run is given twice, or has logged nothing.
        ImportError: Bokeh (or matplotlib, with `png`) is not installed.
        OSError: the disk is full, for example; `output` is then what it was.

    Example:
        >>> write_report(["runs/adamw", "runs/stable_spam"], "report.html")  # doctest: +SKIP
        [PosixPath('report.html')]
    """
    runs, output = read_runs(paths), Path(output)
    empty = [run.label for run in runs if not run.rows]
    if empty:
        raise ValueError(f"each run must have logged something, {empty[0]} has not; train with a smaller logging_steps")
    html = report_html(runs)
    with atomic_file(output) as file:
        file.write_text(html, encoding="utf-8")
    return [output, *(pictures(runs, output.with_suffix("")) if png else [])]


def report_html(runs: Sequence[Run]) -> str:
    """The report as HTML, at most `LARGEST` bytes: with fewer points to a curve if need be."""
    html = render(runs, POINTS, CELLS)
    points, cells = POINTS, CELLS
    while len(html.encode()) > LARGEST and points > 100:
        points, cells = points // 2, cells // 2
        html = render(runs, points, cells)
    return html


def render(runs: Sequence[Run], points: int, cells: int) -> str:
    """The report with at most about `points` points to a curve and `cells` cells to a heat map."""
    try:
        from hf_stablespam.monitor.report import bokeh_figures, page
    except ImportError as error:
        raise ImportError("the report needs Bokeh; pip install 'hf_stablespam[report]'") from error
    labels = [run.label for run in runs]
    diagrams, maps = panels(runs, points), heat_maps(runs, cells)
    script, elements, map_elements = bokeh_figures.embed(diagrams, maps, labels)
    cards = [page.card(panel.title, el, panel.note) for panel, el in zip(diagrams, elements, strict=True)]
    for found, element in zip(maps, map_elements, strict=True):
        cards.append(page.card(f"Gradient norm by block: {labels[found.run]}", element, run=found.run, wide=True))
    reached = reach_table(runs)
    above = [summary_table(runs), *([reached] if reached else [])]
    return page.page(labels, above, cards, [*run_tables(runs), settings_table(runs)], [bokeh_figures.library(), script])


def pictures(runs: Sequence[Run], stem: Path) -> list[Path]:
    """Each diagram as a PNG."""
    try:
        from hf_stablespam.monitor.report.png import write_pictures
    except ImportError as error:
        raise ImportError("png needs matplotlib; pip install 'hf_stablespam[plot]'") from error
    return write_pictures(panels(runs, POINTS), heat_maps(runs, CELLS), [run.label for run in runs], stem)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: `report RUN [RUN ...] -o report.html [--png]`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="hf-stablespam report", description="Compare Trainer runs in one HTML file.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, a checkpoint, or a folder of runs")
    parser.add_argument("-o", "--output", default="report.html", help="the file to write; default report.html")
    parser.add_argument("--png", action="store_true", help="also write each diagram as a PNG beside it")
    options = parser.parse_args(arguments)
    try:
        written = write_report(options.runs, options.output, options.png)
    except (OSError, ValueError, ImportError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write("".join(f"{path}\n" for path in written))
    return 0
