"""What came out of the fusion: as numbers, as text, and as tables of the HTML report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from hf_stablespam.recipes.fusechat.preferences import NOTE

TABLES_FILE = "report_tables.json"  # what `hf-stablespam report` looks for in a run's folder


def fusion_report(dataset: Mapping[str, Dataset]) -> dict[str, Any]:
    """Count what each source gave to the two data sets, and what was dropped.

    Args:
        dataset: what `build_preference_dataset` returned, also after `save_to_disk` and `load_from_disk`.

    Returns:
        ``prompts`` (total, sft, dpo; None if the note is lost), ``sft_rows``, ``pairs``, ``mean_gap``, ``sources`` (for
        each source ``sft_rows``, ``sft_share``, ``pairs``, ``pair_share``, ``mean_gap``; shares from 0 to 1) and
        ``dropped``: for ``sft`` and ``dpo`` the number of prompts without a row by reason, each prompt once, by the
        source that came nearest to a pair. ``dropped`` is None where the data sets' description is lost.

    Raises:
        ValueError: a part or a column is missing.

    Example:
        >>> from hf_stablespam.recipes.fusechat import build_preference_dataset
        >>> answers = [(p, f"{p}{i}", i / 20) for p in "xyz" for i in (1, 2)]
        >>> rows = [{"prompt": p, "response": y, "reward": r, "source": "A"} for p, y, r in answers]
        >>> report = fusion_report(build_preference_dataset(rows))
        >>> report["sources"]["A"]["pairs"], report["dropped"]
        (2, {'sft': {}, 'dpo': {}})
    """
    wanted = {"sft": ("source",), "dpo": ("source", "chosen_reward", "rejected_reward")}
    for part, columns in wanted.items():
        missing = [column for column in columns if part in dataset and column not in dataset[part].column_names]
        if part not in dataset or missing:
            raise ValueError(
                f"dataset must have a part {part!r} with the columns {', '.join(columns)};"
                " build_preference_dataset makes both parts"
            )
    note = _note(dataset)
    sft, dpo = (np.asarray([str(name) for name in dataset[part]["source"][:]], object) for part in ("sft", "dpo"))
    gaps = np.asarray(dataset["dpo"]["chosen_reward"][:], float) - np.asarray(
        dataset["dpo"]["rejected_reward"][:], float
    )
    names = list(dict.fromkeys([*(note or {}).get("sources", ()), *sft, *dpo]))
    sources = {}
    for name in names:
        rows, pairs = int((sft == name).sum()), int((dpo == name).sum())
        sources[name] = {
            "sft_rows": rows,
            "sft_share": rows / len(sft) if len(sft) else 0.0,
            "pairs": pairs,
            "pair_share": pairs / len(dpo) if len(dpo) else 0.0,
            "mean_gap": float(gaps[dpo == name].mean()) if pairs else None,
        }
    return {
        "prompts": note and {"total": note["prompts"], "sft": note["sft_prompts"], "dpo": note["dpo_prompts"]},
        "sft_rows": len(sft),
        "pairs": len(dpo),
        "mean_gap": float(gaps.mean()) if len(dpo) else None,
        "sources": sources,
        "dropped": note and {"sft": note["sft_dropped"], "dpo": note["dpo_dropped"]},
    }


def report_tables(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The report as tables with ``title``, ``columns``, ``rows`` (heading and cells) and ``note``, all of them text."""
    rows = []
    for name, figures in report["sources"].items():
        gap = "–" if figures["mean_gap"] is None else f"{figures['mean_gap']:.4g}"
        counts = (f"{figures['sft_rows']:,}", f"{figures['sft_share']:.1%}", f"{figures['pairs']:,}")
        rows.append([name, [*counts, f"{figures['pair_share']:.1%}", gap]])
    columns = ["SFT rows", "share of SFT rows", "pairs", "share of pairs", "mean gap of rewards"]
    tables = [{"title": "Fusion: what each source gave", "columns": columns, "rows": rows, "note": ""}]
    if report["prompts"] is None:
        return tables
    reasons = dict.fromkeys([*report["dropped"]["sft"], *report["dropped"]["dpo"]])
    used = [["prompts", [f"{report['prompts'][part]:,}" for part in ("sft", "dpo")]]]
    used.append(["rows", [f"{report['sft_rows']:,}", f"{report['pairs']:,}"]])
    used += [
        [f"dropped: {reason}", [f"{report['dropped'][part].get(reason, 0):,}" for part in ("sft", "dpo")]]
        for reason in reasons
    ]
    note = "A prompt is dropped for the reason of the source that came nearest to a pair." if reasons else ""
    return [*tables, {"title": "Fusion: prompts", "columns": ["SFT", "DPO"], "rows": used, "note": note}]


def write_report_tables(report: Mapping[str, Any], folder: str | Path) -> Path:
    """Put the report into a run's folder, where `hf-stablespam report` finds it; returns the file."""
    path = Path(folder, TABLES_FILE)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"tables": report_tables(report)}, ensure_ascii=False, indent=1), encoding="utf-8")
    return path


def as_text(report: Mapping[str, Any]) -> str:
    """The tables for a terminal."""
    lines = []
    for table in report_tables(report):
        cells = [["", *table["columns"]], *([heading, *row] for heading, row in table["rows"])]
        widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
        lines.append(table["title"])
        for row in cells:
            first, *others = (
                text.ljust(width) if column == 0 else text.rjust(width)
                for column, (text, width) in enumerate(zip(row, widths, strict=True))
            )
            lines.append("  ".join(["", first, *others]).rstrip())
        lines.append("")
    return "\n".join(lines)


def _note(dataset: Mapping[str, Dataset]) -> dict[str, Any] | None:
    """What `build_preference_dataset` wrote into the description; None where that has been lost."""
    for part in ("sft", "dpo"):
        try:
            return json.loads(dataset[part].info.description)[NOTE]
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    return None
