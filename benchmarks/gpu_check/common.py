"""What the parts share: the device, the clock, and rows that are in the file as soon as they are known."""

from __future__ import annotations

import contextlib
import csv
import platform
import time
import traceback
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from unittest import mock

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Check:
    """One part of the run.

    Args:
        part: its name, and that of its CSV file.
        results: the folder of the files.
        seconds: the part's share of the time.
        rehearsal: tiny sizes.
    """

    def __init__(self, part: str, results: Path, seconds: float, rehearsal: bool) -> None:
        self.rehearsal = rehearsal
        self.failed = 0
        self._file, self._end = results / f"{part}.csv", time.monotonic() + seconds
        results.mkdir(parents=True, exist_ok=True)

    def seconds_left(self) -> float:
        """Of this part, with a few kept for its end."""
        return self._end - time.monotonic() - (0.5 if self.rehearsal else 5)

    def row(self, **columns: Any) -> None:
        """Append a row, with date, device and versions; the file is complete at any time."""
        row = {**columns, "date": time.strftime("%Y-%m-%d"), "device": device_name(), "versions": versions()}
        earlier = list(csv.DictReader(self._file.open(newline=""))) if self._file.exists() else []
        names = list(dict.fromkeys(name for one in [*earlier, row] for name in one))
        with self._file.open("w", newline="") as file:
            writer = csv.DictWriter(file, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows([*earlier, row])
        print({name: value for name, value in columns.items() if value != ""}, flush=True)

    @contextlib.contextmanager
    def trying(self, **columns: Any) -> Iterator[dict[str, Any]]:
        """A block whose failure is a row, too, and no end of the part. It may fill the columns that are yielded."""
        start, found = time.monotonic(), {"passed": 1, "detail": ""}
        try:
            yield found
        except Exception as error:
            traceback.print_exc()
            found.update(passed=0, detail=f"{type(error).__name__}: {error}".replace("\n", " ")[:300])
        self.failed += not found["passed"]
        self.row(**columns, **found, seconds=round(time.monotonic() - start, 2))


def device_name() -> str:
    """The GPU, or that there was none."""
    return torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU ({platform.machine()}), rehearsal"


def versions() -> str:
    """Of what matters here."""
    found = []
    for package in ("torch", "triton", "transformers"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    return ", ".join(found)


@contextlib.contextmanager
def by_triton() -> Iterator[dict[str, Any]]:
    """Options with which StableSPAM takes the Triton kernels; on a CPU these run in the interpreter."""
    if DEVICE == "cuda":
        yield {"fused": True}
        return
    from hf_stablespam.optim import step
    from hf_stablespam.optim.backends.triton_ops import TritonOps

    with mock.patch.object(step, "choose_backend", return_value=TritonOps):
        yield {}


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def medians(runs: dict[str, Callable[[], Any]], repeats: int, warm_up: int = 3) -> dict[str, float]:
    """Milliseconds of each run; the runs take turns."""
    from benchmarks._record import interleaved, quantile

    return {name: quantile(seconds, 0.5) * 1e3 for name, seconds in interleaved(runs, repeats, warm_up).items()}


def reset_peak() -> None:
    """Count the peak of memory from here on."""
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float | str:
    """The peak since `reset_peak`, in GiB; nothing on a CPU."""
    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if DEVICE == "cuda" else ""
