"""`spikes.jsonl`: the last gradient spikes of a run, one JSON object per line.

Lines are appended with one write of whole lines, and when there are too many the file is replaced by a new one with
the last of them; both are on the disk before the call returns. After a crash the file is therefore complete, but for
at most one line that was cut off at its end, which readers skip and the next write removes.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FILE_NAME = "spikes.jsonl"


@dataclass(frozen=True)
class Spike:
    """One gradient tensor that stood out in one update step.

    Args:
        step: update step, from 1, as in the Trainer's logs.
        tensor: name of the parameter, as in `named_parameters`.
        magnitude: largest entry of its gradient, before the Trainer's own clipping; None where it was not finite.
        threshold: AdaClip's threshold of that step, above which entries were scaled down; with an optimizer that does
            not clip, the magnitude above which the recorder sees a spike; None where neither is known yet.
        score: the magnitude in multiples of what is usual for the tensor; None where it was not finite.
        loss: training loss of that step, None where it is not known or not finite.
        learning_rate: learning rate of the tensor in that step.
        data_indices: indices of the step's samples in the data set, on all processes; None where they are not known.
    """

    step: int
    tensor: str
    magnitude: float | None
    threshold: float | None
    score: float | None
    loss: float | None
    learning_rate: float | None
    data_indices: list[int] | None


class SpikeFile:
    """Writes a `spikes.jsonl` that never holds more than `keep` lines.

    Args:
        path: the file; its folder is made when there is something to write.
        keep: lines to keep, the last ones.

    Example:
        >>> import tempfile
        >>> file = SpikeFile(Path(tempfile.mkdtemp()) / "spikes.jsonl", keep=2)
        >>> for step in (3, 5, 8):
        ...     file.append([Spike(step, "weight", 9.0, 1.0, 12.5, 2.25, 1e-3, [4, 7])])
        >>> [spike["step"] for spike in read_spikes(file.path)]
        [5, 8]
    """

    def __init__(self, path: Path, keep: int) -> None:
        self.path = path
        self.keep = keep
        self._lines: int | None = None  # in the file, once it is known that all of them are whole

    def append(self, spikes: Sequence[Spike]) -> None:
        """Add spikes at the end."""
        if not spikes:
            return
        lines = [json.dumps(_finite(asdict(spike)), allow_nan=False) for spike in spikes]
        if self._lines is None or self._lines + len(lines) > self.keep:
            self._replace([*map(json.dumps, read_spikes(self.path)), *lines])
            return
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        except FileNotFoundError:  # somebody has deleted it
            self._replace(lines)
            return
        try:
            _write(descriptor, lines)
        finally:
            os.close(descriptor)
        self._lines += len(lines)

    def drop_after(self, step: int) -> None:
        """Remove the spikes after `step`, from which a run goes on: it will come to them again."""
        if self.path.exists():
            self._replace([json.dumps(spike) for spike in read_spikes(self.path) if spike["step"] <= step])

    def _replace(self, lines: list[str]) -> None:
        lines = lines[-self.keep :]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_name(self.path.name + ".new")
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            _write(descriptor, lines)
        finally:
            os.close(descriptor)
        os.replace(new, self.path)
        self._lines = len(lines)


def read_spikes(path: str | Path) -> list[dict[str, Any]]:
    """The spikes in a `spikes.jsonl`, oldest first; a line that cannot be read is left out.

    Args:
        path: the file, or the run's folder that holds it. No such file gives no spikes.
    """
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    spikes = []
    for line in text.splitlines():
        try:
            spike = json.loads(line)
        except (ValueError, RecursionError):
            continue
        step = spike.get("step") if isinstance(spike, dict) else None
        if isinstance(step, int) and abs(step) < 2**63:
            spikes.append(spike)
    return spikes


def _write(descriptor: int, lines: Sequence[str]) -> None:
    data = "".join(f"{line}\n" for line in lines).encode()
    while data:
        data = data[os.write(descriptor, data) :]
    os.fsync(descriptor)


def _finite(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with None for numbers that JSON does not have."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in fields.items()
    }
