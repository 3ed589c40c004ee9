"""Scored answers → checked columns: texts stay in Arrow, prompts and sources become integers."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from hf_stablespam._names import nearest

Integers = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float64]]
Booleans = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True)
class Responses:
    """Answers as columns, one entry per row of the input.

    Args:
        prompt: number of the prompt, (rows,); prompts are numbered in the order of their first appearance.
        source: number of the source, (rows,), likewise.
        score: the reward, (rows,), finite.
        correct: whether the answer is right, (rows,); None where nobody said.
        sources: names of the sources, by their numbers.
        table: the columns `prompt`, `response`, `source`, `score` as they came, to take the chosen rows from.
    """

    prompt: Integers
    source: Integers
    score: Floats
    correct: Booleans | None
    sources: list[str]
    table: pa.Table

    @property
    def prompts(self) -> int:
        """How many prompts there are."""
        return int(self.prompt.max()) + 1

    def same_text(self, left: Integers, right: Integers) -> Booleans:
        """Whether the answers in the rows `left` and those in the rows `right` are equal, pair by pair."""
        texts = self.table["response"]
        one, other = texts.take(pa.array(left)), texts.take(pa.array(right))
        if not pa.types.is_nested(texts.type):
            return pc.equal(one, other).to_numpy().astype(bool)
        pairs = zip(one.to_pylist(), other.to_pylist(), strict=True)
        return np.fromiter((a == b for a, b in pairs), bool, len(left))


def read_responses(
    responses: Dataset | Sequence[Mapping[str, Any]],
    *,
    prompt_key: str,
    response_key: str,
    source_key: str,
    score_key: str,
    correct_key: str | None,
) -> Responses:
    """Check the input, see `build_preference_dataset` for its form and for what is raised."""
    keys = {"prompt": prompt_key, "response": response_key, "source": source_key, "score": score_key}
    if correct_key is not None:
        keys["correct"] = correct_key
    columns = columns_of(responses, keys)
    if not len(columns["prompt"]):
        raise ValueError("responses must have at least one row, got none; sample_responses makes them")
    for name in ("prompt", "response", "source"):
        if columns[name].null_count:
            row = pc.index(columns[name].is_null(), True).as_py()
            raise ValueError(f"{keys[name]!r} must have a value in every row, row {row} has none; leave such rows out")
    for name in ("prompt", "response"):
        _check_texts(columns[name], keys[name])
    if pa.types.is_nested(columns["response"].type) and not pa.types.is_nested(columns["prompt"].type):
        raise ValueError(
            f"{response_key!r} holds chat messages and {prompt_key!r} strings; give both as messages, or the text only"
        )
    prompt, texts = numbered(columns["prompt"])
    source, names = numbered(columns["source"])
    _warn_about_whitespace(texts)
    return Responses(
        prompt,
        source,
        _scores(columns["score"], score_key),
        None if correct_key is None else _flags(columns["correct"], correct_key),
        [str(name) for name in names.to_pylist()],
        pa.table({name: columns[name] for name in ("prompt", "response", "source", "score")}),
    )


def columns_of(responses: Dataset | Sequence[Mapping[str, Any]], keys: Mapping[str, str]) -> dict[str, pa.ChunkedArray]:
    """The named columns as Arrow arrays: those of a `Dataset` as they lie in memory or on the disk."""
    if isinstance(responses, Dataset):
        for key in keys.values():
            if key not in responses.column_names:
                raise _missing(key, responses.column_names, "responses")
        chosen = responses.select_columns(list(dict.fromkeys(keys.values())))
        table = chosen.with_format("arrow")[:]
        return {name: _plain(table[key], key, name) for name, key in keys.items()}
    if isinstance(responses, (str, bytes, Mapping)) or not isinstance(responses, Sequence):
        raise TypeError(f"responses must be a Dataset or a list of mappings, got {type(responses).__name__}")
    for index, row in enumerate(responses):
        if not isinstance(row, Mapping):
            raise TypeError(f"responses must be mappings with the columns as keys, row {index} is {row!r}")
        for key in keys.values():
            if key not in row:
                raise _missing(key, row, f"row {index} of responses")
    return {name: _array([row[key] for row in responses], key, name) for name, key in keys.items()}


def numbered(column: pa.ChunkedArray) -> tuple[Integers, pa.Array]:
    """Each value's number in the order of first appearance, (rows,), and the different values as text."""
    if pa.types.is_nested(column.type):
        return _numbered_messages(column)
    encoded = column.dictionary_encode().unify_dictionaries()
    codes = np.concatenate([chunk.indices.to_numpy(zero_copy_only=False) for chunk in encoded.chunks])
    values, first, codes = np.unique(codes, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return rank[codes].astype(np.int64), encoded.chunk(0).dictionary.take(pa.array(values[order]))


def _numbered_messages(column: pa.ChunkedArray) -> tuple[Integers, pa.Array]:
    """Chat messages have no hash in Arrow: they are compared by their JSON, a block of rows at a time."""
    numbers: dict[str, int] = {}
    codes = np.empty(len(column), np.int64)
    for start in range(0, len(column), 10_000):
        for row, value in enumerate(column.slice(start, 10_000).to_pylist(), start):
            key = json.dumps(value, sort_keys=True, ensure_ascii=False, default=repr)
            codes[row] = numbers.setdefault(key, len(numbers))
    return codes, pa.array(numbers, pa.large_string())


def _plain(column: pa.ChunkedArray, key: str, name: str) -> pa.ChunkedArray:
    """The column itself, unless datasets has kept values of several kinds as JSON: then as a list of rows has it."""
    if not isinstance(column.type, pa.BaseExtensionType):
        return column
    return _array([None if text is None else json.loads(text) for text in column.to_pylist()], key, name)


def _array(values: list[Any], key: str, name: str) -> pa.ChunkedArray:
    """One column of a list of rows."""
    if name == "score" and any(isinstance(value, bool) for value in values):  # Arrow would make numbers of them
        return _as_floats(values, key)
    try:
        return pa.chunked_array([pa.array(values)])
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        if name == "score":
            return _as_floats(values, key)
        if name == "correct":
            row = next(index for index, value in enumerate(values) if not isinstance(value, (bool, np.bool_)))
            raise _not_boolean(key, row, values[row]) from None
        raise ValueError(f"{key!r} must have values of one kind in all rows: {error}") from None


def _as_floats(values: list[Any], key: str) -> pa.ChunkedArray:
    """Of scores that Arrow has no kind for: integers too large for it are numbers still."""
    floats = []
    for row, value in enumerate(values):
        if not _is_number(value):
            raise _not_a_number(key, row, value)
        try:
            floats.append(float(value))
        except OverflowError:
            raise _not_a_number(key, row, math.inf) from None
    return pa.chunked_array([pa.array(floats, pa.float64())])


def _check_texts(column: pa.ChunkedArray, key: str) -> None:
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kept_as_json = isinstance(kind.value_type, pa.BaseExtensionType)  # messages with keys of their own
        if kept_as_json or (pa.types.is_struct(kind.value_type) and kind.value_type.get_field_index("role") >= 0):
            return
    raise ValueError(
        f"{key!r} must be a string or a list of chat messages (with 'role' and 'content') in every row, row 0 has"
        f" {column[0].as_py()!r}; make a text of it with str(...), or put a single message into a list"
    )


def _scores(column: pa.ChunkedArray, key: str) -> Floats:
    kind = column.type
    if not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
        values = column.to_pylist()
        row = next((index for index, value in enumerate(values) if not _is_number(value)), 0)
        raise _not_a_number(key, row, values[row])
    scores = column.to_numpy().astype(np.float64)  # a missing one becomes nan
    bad = np.flatnonzero(~np.isfinite(scores))
    if bad.size:
        raise _not_a_number(key, int(bad[0]), column[int(bad[0])].as_py())
    return scores


def _flags(column: pa.ChunkedArray, key: str) -> Booleans:
    if not pa.types.is_boolean(column.type) or column.null_count:
        values = column.to_pylist()
        row = next(index for index, value in enumerate(values) if not isinstance(value, bool))
        raise _not_boolean(key, row, values[row])
    return column.to_numpy().astype(bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)  # NumPy's numbers among them


def _not_a_number(key: str, row: int, value: Any) -> ValueError:
    return ValueError(
        f"{key!r} must be a finite number in every row, row {row} has {value!r}; leave such rows out or score them anew"
    )


def _not_boolean(key: str, row: int, value: Any) -> TypeError:
    return TypeError(f"{key!r} must be True or False in every row, row {row} has {value!r}; convert it with bool(...)")


def _missing(key: str, known: Any, where: str) -> ValueError:
    names = ", ".join(repr(name) for name in known)
    return ValueError(f"{where} must have a column {key!r}{nearest(key, known)}, its columns are {names or 'none'}")


def _warn_about_whitespace(prompts: pa.Array) -> None:
    """Two prompts that differ in nothing but whitespace are most likely meant to be one."""
    if not (pa.types.is_string(prompts.type) or pa.types.is_large_string(prompts.type)):
        return
    bare = pc.replace_substring_regex(prompts, r"(\s|\\[nrt])+", "")
    twins = len(bare) - len(bare.unique())
    if twins:
        warnings.warn(
            f"{twins} prompts differ from another only in whitespace and count as prompts of their own; strip them"
            " if they are meant to be the same",
            stacklevel=4,
        )
