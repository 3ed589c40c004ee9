"""Time and memory of `build_preference_dataset` on many rows that lie on the disk.

python benchmarks/fusechat_rows.py                  # 100,000 and 1,000,000 rows, as text and as chat messages
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from datasets import Dataset, concatenate_datasets, load_from_disk

from benchmarks import _record

NAME = "fusechat_rows"
SOURCES, ANSWERS, LETTERS = 5, 5, 600


def write(folder: Path, rows: int, form: str) -> None:
    """Answers of 600 letters, 25 to a prompt of 200."""

    def columns(start: int, count: int) -> dict[str, list]:
        draw, numbers = random.Random(start), range(start, start + count)
        prompts = [f"prompt {i // (SOURCES * ANSWERS)} ".ljust(200, ".") for i in numbers]
        chat = [[{"role": "user", "content": text}] for text in prompts]
        return {
            "prompt": prompts if form == "text" else chat,
            "response": [f"answer {i} ".ljust(LETTERS, ".") for i in numbers],
            "source": [f"model {i // ANSWERS % SOURCES}" for i in numbers],
            "reward": [draw.gauss(0.15, 0.03) for _ in numbers],
        }

    parts = [Dataset.from_dict(columns(start, 10_000)) for start in range(0, rows, 10_000)]
    concatenate_datasets(parts).save_to_disk(folder / form)


def measure(folder: Path) -> dict[str, float]:
    """In this process: seconds, and megabytes above what was resident before."""
    from hf_stablespam.recipes.fusechat import build_preference_dataset

    dataset = load_from_disk(folder)
    build_preference_dataset(dataset.select(range(1000)))  # what is imported and made once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    built = build_preference_dataset(dataset)
    seconds = time.process_time() - start
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"cpu_seconds": round(seconds, 2), "peak_mb": round(peak), "pairs": len(built["dpo"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--measure", type=Path, help="a folder; used by the script itself, in a process of its own")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    for rows in options.rows:
        for form in ("text", "messages"):
            with tempfile.TemporaryDirectory() as folder:
                write(Path(folder), rows, form)
                size = sum(file.stat().st_size for file in Path(folder, form).iterdir()) / 2**20
                command = [sys.executable, __file__, "--measure", str(Path(folder, form))]
                shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                row = {
                    "rows": rows,
                    "prompts_as": form,
                    "columns_mb": round(size),
                    **json.loads(shown.splitlines()[-1]),
                }
                _record.append_rows(NAME, [row])
                print(row)


if __name__ == "__main__":
    main()
