"""Files of scored answers → the two data sets on the disk, with their report."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
from datasets import Dataset, concatenate_datasets
from datasets.exceptions import DatasetGenerationError

from hf_stablespam.recipes.fusechat.preferences import build_preference_dataset
from hf_stablespam.recipes.fusechat.report import as_text, fusion_report, write_report_tables

SEEN_TOGETHER = 100_000  # lines of which a column's kind is found; in those after them it must be the same


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
        try:
            is_parquet = path.endswith(".parquet")
            parts.append(Dataset.from_parquet(path, cache_dir=cache) if is_parquet else _read_json_lines(path, cache))
        except (DatasetGenerationError, StopIteration) as error:
            raise ValueError(
                f"{path}: cannot be read as columns ({error.__cause__ or error});"
                " every line must have values of the same kind"
            ) from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    try:
        return concatenate_datasets(parts)
    except ValueError as error:
        raise ValueError(f"RESPONSES must have the same columns, of the same kinds: {error}") from None


def _read_json_lines(path: str, cache: str) -> Dataset:
    """By Python's reader: Arrow's makes points in time of texts that look like dates."""
    keys = tuple(dict.fromkeys(key for row in _objects(path) for key in row))
    if not keys:
        raise ValueError("the file must have at least one line, it is empty")
    return Dataset.from_generator(
        _rows, gen_kwargs={"path": path, "keys": keys}, cache_dir=cache, writer_batch_size=SEEN_TOGETHER
    )


def _rows(path: str, keys: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Every line with all keys of the file."""
    for row in _objects(path):
        yield {key: row.get(key) for key in keys}


def _objects(path: str) -> Iterator[dict[str, Any]]:
    """The JSON object of each line that is not blank."""
    try:
        with fsspec.open(path, "rt", encoding="utf-8-sig", compression="infer") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _object(number, line)
    except UnicodeDecodeError as error:
        raise ValueError(f"the file must be text in UTF-8 ({error}); convert it") from None


def _object(number: int, line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as problem:
        raise ValueError(f"line {number} must be a JSON object ({problem}); mend it or leave it out") from None
    if not isinstance(found, dict):
        raise ValueError(f"line {number} must be a JSON object, got {line.strip()[:60]!r}; write one for each answer")
    return found
