"""Tables that whoever made a run left in its folder, for the report to show: `report_tables.json`.

The file holds ``{"tables": [{"title": …, "columns": […], "rows": [[heading, [cell, …]], …], "note": …}]}``, all text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_stablespam.monitor.report.runs import Run, step_of
from hf_stablespam.monitor.report.tables import Table

FILE = "report_tables.json"


def run_tables(runs: Sequence[Run]) -> list[Table]:
    """The tables in the runs' folders; one that several runs have is shown once, with all their names.

    Raises:
        ValueError: a file does not hold tables.
    """
    found: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for run in runs:
        for table in read_tables(run.folder):
            found.setdefault(json.dumps(table, sort_keys=True), (table, []))[1].append(run.label)
    shown = []
    for table, labels in found.values():
        title = table["title"] if len(runs) == 1 else f"{table['title']} ({', '.join(labels)})"
        rows = [(heading, list(cells)) for heading, cells in table["rows"]]
        shown.append(Table(title, table["columns"], rows, note=table.get("note", "")))
    return shown


def read_tables(folder: Path) -> list[dict[str, Any]]:
    """The tables of one run; none where it has no file. A checkpoint's are in the folder of its run."""
    places = [folder, *([folder.parent] if step_of(folder / FILE) is not None else [])]
    path = next((place / FILE for place in places if (place / FILE).is_file()), None)
    if path is None:
        return []
    try:
        tables = json.loads(path.read_text(encoding="utf-8"))["tables"]
        if not all(_is_table(table) for table in tables):
            raise ValueError("not every table has a title, columns, and rows of as many cells")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} must hold tables in JSON, it does not ({error}); remove it or make it anew") from None
    return tables


def _is_table(table: Any) -> bool:
    width = len(table["columns"])
    texts = [table["title"], table.get("note", ""), *table["columns"]]
    for heading, cells in table["rows"]:
        if len(cells) != width:
            return False
        texts += [heading, *cells]
    return all(isinstance(text, str) for text in texts)
