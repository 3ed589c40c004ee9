"""Files of scored answers → the two data sets on the disk, with their report."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets
from datasets.exceptions import DatasetGenerationError

from hf_stablespam.recipes.fusechat.preferences import build_preference_dataset
from hf_stablespam.recipes.fusechat.report import as_text, fusion_report, write_report_tables


def fuse_files(paths: Sequence[str], output: str, options: Mapping[str, Any]) -> str:
    """Build the data sets of the answers in files, save them, and say in words what came out.

    Args:
        paths: JSON-lines or Parquet files.
        output: the folder to write, new or empty.
        options: of `build_preference_dataset`.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: `output` holds something, a file cannot be read, or `build_preference_dataset` refuses the rows.
    """
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"output must be a new or an empty folder, got {output!r}; give another one")
    with tempfile.TemporaryDirectory() as cache:
        try:
            dataset = build_preference_dataset(read_files(paths, cache), **options)
        except TypeError as error:  # of what a file holds, not of how we are called
            raise ValueError(str(error)) from None
        # Without a number of shards datasets 5.2 writes none for an empty part, and then cannot load it.
        dataset.save_to_disk(folder, num_shards={part: None if len(rows) else 1 for part, rows in dataset.items()})
    report = fusion_report(dataset)
    (folder / "fusion_report.json").write_text(json.dumps(report, ensure_ascii=False, indent=1), encoding="utf-8")
    write_report_tables(report, folder)
    return as_text(report)


def read_files(paths: Sequence[str], cache: str) -> Dataset:
    """The rows of JSON-lines or Parquet files, one after the other.

    Args:
        paths: the files.
        cache: folder for their Arrow form, which is read from the disk as it is needed.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a line is no JSON object, a file has no rows, or files have columns of different kinds.
    """
    parts = []
    for path in paths:
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"RESPONSES must be files of JSON lines or Parquet, got {path}, which does not exist"
            )
        read = Dataset.from_parquet if path.endswith(".parquet") else Dataset.from_json
        try:
            parts.append(read(path, cache_dir=cache))
        except (DatasetGenerationError, ValueError, StopIteration) as error:
            raise ValueError(f"{path}: {_why_unreadable(path, error)}") from None
    try:
        return concatenate_datasets(parts)
    except ValueError as error:
        raise ValueError(f"RESPONSES must have the same columns, of the same kinds: {error}") from None


def _why_unreadable(path: str, error: Exception) -> str:
    """The first line that is no JSON object, or else what the reader said."""
    if not path.endswith(".parquet"):
        with open(path, encoding="utf-8") as file:
            line = 0
            for line, text in enumerate(file, 1):
                try:
                    if not isinstance(json.loads(text), dict):
                        return (
                            f"line {line} must be a JSON object, got {text.strip()[:60]!r}; write one for each answer"
                        )
                except json.JSONDecodeError as problem:
                    return f"line {line} must be a JSON object ({problem}); mend it or leave it out"
            if not line:
                return "the file must have at least one line, it is empty"
    return f"cannot be read as columns ({error.__cause__ or error}); every line must have values of the same kind"
