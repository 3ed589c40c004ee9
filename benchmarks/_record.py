"""What the benchmarks share: interleaved timing, and rows of a CSV file that say on what they were measured."""

import csv
import functools
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def machine() -> str:
    """The processor or accelerator, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpu_info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpu_info.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


def commit() -> str:
    """The commit of the working tree, with a ``+`` if it has changes besides rows of results."""
    here = ["git", "-C", str(Path(__file__).parent)]
    run = functools.partial(subprocess.run, capture_output=True, text=True, check=False)
    name = run([*here, "describe", "--always", "--abbrev=9"]).stdout.strip()
    changes = run([*here, "status", "--porcelain", "--untracked-files=no", "--", ":/", f":!{RESULTS.name}"]).stdout
    return f"{name}{'+' if changes else ''}" if name else "unknown"


COMMIT = commit()  # when the program began: that is what it measures, whatever is changed while it runs


def interleaved(runs: dict[str, Callable[[], Any]], repeats: int, warm_up: int = 3) -> dict[str, list[float]]:
    """Seconds of each run, sorted; the runs take turns, so that a disturbance of the machine meets all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(warm_up + repeats):
        for name, run in runs.items():
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            if repeat >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return {name: sorted(values) for name, values in seconds.items()}


def synchronize() -> None:
    """Wait for the accelerator, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def quantile(values: list[float], share: float) -> float:
    """The value below which this share of the sorted values lies."""
    return values[min(len(values) - 1, int(share * len(values)))]


def append_rows(name: str, rows: list[dict[str, Any]]) -> None:
    """Append rows to ``results/<name>.csv``, each with date, machine, versions and commit."""
    where = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": COMMIT,
        "load": round(os.getloadavg()[0], 1),  # of the last minute: above the number of cores others disturbed
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.csv"
    rows = [{**where, **row} for row in rows]
    earlier = list(csv.DictReader(path.open(newline=""))) if path.exists() else []
    columns = list(dict.fromkeys(column for row in [*earlier, *rows] for column in row))
    unchanged = bool(earlier) and list(earlier[0]) == columns
    with path.open("a" if unchanged else "w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if not unchanged:  # a new file, or a column that earlier rows do not have
            writer.writeheader()
            writer.writerows(earlier)
        writer.writerows(rows)
