"""The demo on record: what `make demo` left in its folder, as rows of `results/demo.csv`.

    make demo && python benchmarks/demo_record.py          # appended; run it on the machine and commit of the demo
    python benchmarks/demo_record.py --folder demo --dry-run

README shows the newest rows.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import demo

from benchmarks._record import RESULTS, append_rows

NAME = "demo"


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """One row for each run of the demo in a folder."""
    histories = {run.folder: _history(folder / run.folder) for run in demo.RUNS}
    target = demo.series(histories[demo.BASELINE], "eval_loss")[1][-1]
    rows = []
    for run in demo.RUNS:
        history = histories[run.folder]
        steps, losses = demo.series(history, "eval_loss")
        row = {"transformers": version("transformers"), "optimizer": run.optimizer, "precision": run.precision}
        row |= {"steps": steps[-1], "loss": round(losses[-1], 4)}
        row |= {"target": round(target, 4), "steps_to_target": demo.steps_to_reach(history, target) or ""}
        row["load"] = ""  # the demo's is not known any more
        row["seconds"] = round(demo.series(history, "train_runtime")[1][-1], 1)
        rows.append(row)
    return rows


def _history(folder: Path) -> list[dict[str, float]]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def table() -> str:
    """The newest demo on record, as a table of Markdown."""
    path = RESULTS / f"{NAME}.csv"
    newest = list(csv.DictReader(path.open(newline="")))[-len(demo.RUNS) :]
    lines = [
        f"On {newest[0]['machine']}, with torch {newest[0]['torch']} and transformers {newest[0]['transformers']}:\n",
        f"| optimizer | linear layers | validation loss | steps to {float(newest[0]['target']):.3f} | seconds |",
        "|---|---|---:|---:|---:|",
    ]
    for row in newest:
        figures = f"{float(row['loss']):.3f} | {row['steps_to_target'] or 'not reached'} | {float(row['seconds']):.0f}"
        lines.append(f"| {row['optimizer']} | {row['precision']} | {figures} |")
    return "\n".join(lines)


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where `make demo` wrote")
    parser.add_argument("--dry-run", action="store_true", help="only print the rows")
    options = parser.parse_args(command_line)
    rows = rows_of(options.folder)
    print(*rows, sep="\n")
    if not options.dry_run:
        append_rows(NAME, rows)


if __name__ == "__main__":
    main()
