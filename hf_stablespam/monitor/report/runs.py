"""What a Trainer run left in its folder: the log history, the spikes, the settings. Nothing is executed to read it."""

from __future__ import annotations

import io
import json
import math
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_stablespam.monitor.spike_file import read_spikes

STATE = "trainer_state.json"
ARGUMENTS = "training_args.bin"
SECRETS = ("token", "key", "apikey", "secret", "password")


@dataclass(frozen=True)
class Run:
    """One run, as far as its folder tells.

    Args:
        label: its name in the report, unique there.
        folder: where it was found.
        rows: the numbers of the log history, a dictionary with a `step` for each log.
        spikes: lines of `spikes.jsonl`.
        settings: hyperparameters by name, as text.
    """

    label: str
    folder: Path
    rows: list[dict[str, float]]
    spikes: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, str] = field(default_factory=dict)

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of one logged quantity; a step that was logged twice has its last value."""
        points = {row["step"]: row[key] for row in self.rows if key in row}
        steps = sorted(points)
        return steps, [points[step] for step in steps]

    def last(self, key: str) -> float | None:
        """The last logged value; None when there is none."""
        return next((row[key] for row in reversed(self.rows) if key in row), None)


def read_runs(paths: Sequence[str | Path]) -> list[Run]:
    """The runs in `paths`, each a run's folder, a checkpoint, a `trainer_state.json`, or a folder of runs.

    Raises:
        FileNotFoundError: a path does not exist, or there is no run in it.
        ValueError: a file is broken, or a run is given twice.
    """
    states = [state for path in paths for state in find_states(Path(path))]
    twice = [str(state) for state, count in Counter(state.resolve() for state in states).items() if count > 1]
    if twice:
        raise ValueError(f"each run must be given once, got {twice[0]} twice; leave one of them out")
    labels = unique_labels([name_of(state) for state in states])
    return [read_run(state, label) for state, label in zip(states, labels, strict=True)]


def find_states(path: Path) -> list[Path]:
    """The `trainer_state.json` files that `path` stands for."""
    if not path.exists():
        raise FileNotFoundError(f"RUN must be a folder or a {STATE}, got {path}, which does not exist")
    if path.is_file():
        return [path]
    own = newest_state(path)
    if own is not None:
        return [own]
    found = [newest_state(folder) for folder in sorted(path.iterdir()) if folder.is_dir()]
    states = [state for state in found if state is not None]
    if not states:
        raise FileNotFoundError(
            f"RUN must hold a {STATE}, itself, in a checkpoint or in its folders, got {path}, which has none; "
            "the Trainer writes one with every checkpoint and with trainer.save_state()"
        )
    return states


def newest_state(folder: Path) -> Path | None:
    """The folder's own state, or that of its newest checkpoint, whichever was written last."""
    checkpoints = [path for path in folder.glob(f"checkpoint-*/{STATE}") if step_of(path) is not None]
    candidates = sorted(checkpoints, key=lambda path: step_of(path) or 0)[-1:]
    if (folder / STATE).is_file():
        candidates.append(folder / STATE)
    return max(candidates, key=lambda path: path.stat().st_mtime, default=None)


def step_of(state: Path) -> int | None:
    """The step in a checkpoint's folder name; None for another folder."""
    match = re.fullmatch(r"checkpoint-(\d+)", state.parent.name)
    return int(match[1]) if match else None


def name_of(state: Path) -> tuple[str, ...]:
    """The parts of a run's folder, that of the run where the state is a checkpoint's."""
    folder = state.resolve().parent
    return (folder.parent if step_of(state) is not None else folder).parts


def unique_labels(names: Sequence[tuple[str, ...]]) -> list[str]:
    """For each path its last part, with as many parts before it as it takes to tell it from the others."""
    labels = []
    for name in names:
        others = [other for other in names if other != name]
        depth = 1
        while depth < len(name) and any(other[-depth:] == name[-depth:] for other in others):
            depth += 1
        labels.append("/".join(name[-depth:]))
    counts = Counter(labels)
    return [f"{label} ({i + 1})" if counts[label] > 1 else label for i, label in enumerate(labels)]


def read_run(state: Path, label: str) -> Run:
    """One run from its `trainer_state.json` and what lies beside it."""
    content = read_state(state)
    folder = state.parent
    settings = read_arguments(folder / ARGUMENTS) | read_model_config(folder / "config.json")
    if not settings:
        settings = {key: shown(value) for key, value in content.items() if isinstance(value, (int, float, str))}
    spikes = read_spikes(folder) or (read_spikes(folder.parent) if step_of(state) is not None else [])
    return Run(label, folder, numeric_rows(content["log_history"]), spikes, settings)


def read_state(state: Path) -> dict[str, Any]:
    """The content of a `trainer_state.json`.

    Raises:
        ValueError: no JSON, or no log history in it.
    """
    remedy = "give one of the run's checkpoints, each has its own copy"
    try:
        content = json.loads(state.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{state} must be valid JSON, it is broken or truncated ({error}); {remedy}") from None
    history = content.get("log_history") if isinstance(content, dict) else None
    if not isinstance(history, list) or not all(isinstance(row, dict) for row in history):
        raise ValueError(f"{state} must have a log_history, a list of log rows, and has none; {remedy}")
    return content


def numeric_rows(history: Iterable[Mapping[str, Any]]) -> list[dict[str, float]]:
    """The numbers of each log row that has a step; text, lists and switches are left out."""
    rows = ({key: value for key, value in row.items() if is_number(value)} for row in history)
    return [row for row in rows if "step" in row and math.isfinite(row["step"])]


def is_number(value: Any) -> bool:
    """Whether it is a number that can be drawn: no switch, and no integer beyond what a float holds."""
    return type(value) is float or (type(value) is int and abs(value) < 2**1000)


def read_model_config(path: Path) -> dict[str, str]:
    """What names a model's architecture and size in its `config.json`; nothing when there is no such file."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(config, dict):
        return {}
    names = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    return {f"model.{name}": shown(config[name]) for name in names if name in config}


class _Inert:
    """Stands for any object of a pickle: remembers what it would have been made from, and does nothing."""

    arguments: tuple[Any, ...] = ()

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        """Some pickles fill a dictionary that here is none."""


class _InertUnpickler(pickle.Unpickler):
    """Reads a pickle without importing or calling anything that it names."""

    def find_class(self, module: str, name: str) -> type[_Inert]:
        return _Inert

    def persistent_load(self, identifier: Any) -> None:
        return None


def read_arguments(path: Path) -> dict[str, str]:
    """The hyperparameters in a `training_args.bin`, a pickle, of which no code is run; nothing if it can't be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            entry = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            arguments = _InertUnpickler(io.BytesIO(archive.read(entry))).load()
        fields = without_secrets(arguments.state)
        return {key: shown(value) for key, value in fields.items() if not key.startswith("_")}
    except Exception:  # a damaged pickle can raise anything, and the report does without it
        return {}


def without_secrets(value: Any) -> Any:
    """A setting without what dictionaries in it hold under names of secrets: a report is there to be passed on."""
    if isinstance(value, _Inert):
        return without_secrets(value.arguments[0]) if value.arguments else "…"
    if isinstance(value, (list, tuple)):
        return [without_secrets(item) for item in value]
    if isinstance(value, dict):
        return {key: without_secrets(item) for key, item in value.items() if not names_a_secret(key)}
    return value


def names_a_secret(name: Any) -> bool:
    """Whether the last word of a name is that of a secret: `hub_token` and `apiKey`, not `monkey` or `label_names`."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", str(name)).lower()
    return words.endswith("token") or re.split(r"[^a-z0-9]+", words.strip("_"))[-1] in SECRETS


def shown(value: Any) -> str:
    """A setting of `without_secrets` as text, a small float in the short form."""
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    return f"{value:.12g}" if isinstance(value, float) else str(value)
