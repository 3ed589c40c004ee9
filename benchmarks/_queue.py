"""A queue of runs that any number of processes share: each run is made once, by whoever takes it first."""

import csv
import tempfile
import time
import zlib
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from benchmarks import _record

PAUSE = 10  # seconds between looks at the record while other processes train
Run = TypeVar("Run", bound=Hashable)


def read_record(name: str, from_row: Callable[[dict[str, str]], Run]) -> dict[Run, dict[str, str]]:
    """Every run in the results file `name`, with its row; of runs made twice the last."""
    path = _record.RESULTS / f"{name}.csv"
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {from_row(row): row for row in csv.DictReader(file)}


def claim(run: Hashable) -> FileLock | None:
    """A lock on a run, which ends with the process that holds it; ``None`` while another process trains it."""
    folder = Path(tempfile.gettempdir()) / "hf_stablespam-quality"
    folder.mkdir(exist_ok=True)
    lock = FileLock(folder / f"{zlib.crc32(repr((_record.RESULTS, run)).encode()):08x}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    return lock


def work(missing: Callable[[], Iterable[Run]], train: Callable[[Run], None], at_most: int | None = None) -> int:
    """Make what is missing, asking anew before each run; the number of runs made.

    What other processes are training is waited for, because further runs may depend on it.

    Args:
        missing: the runs that are asked for now and that are not on record.
        train: makes a run and puts it on record.
        at_most: stop after so many runs.
    """
    made = 0
    while at_most is None or made < at_most:
        waiting = list(missing())
        if not waiting:
            break
        claimed = next(((run, lock) for run in waiting if (lock := claim(run))), None)
        if claimed is None:
            time.sleep(PAUSE)
            continue
        run, lock = claimed
        try:
            if run in missing():  # another process may just have finished it
                train(run)
                made += 1
        finally:
            lock.release()
    return made
