"""One part of `benchmarks/gpu_check.sh`, or the table of all.

python -m benchmarks.gpu_check correctness --results out     # kernels against references, no synchronisation
python -m benchmarks.gpu_check step --results out            # the optimizer step at 350M and 1B
python -m benchmarks.gpu_check linear --results out          # 4-bit linears, eager, by kernel, compiled
python -m benchmarks.gpu_check training --results out        # a training step of the 350M Llama
python -m benchmarks.gpu_check loss --results out            # loss over tokens of the 60M Llama
python -m benchmarks.gpu_check table --results out
"""

import argparse
import csv
import importlib
import sys
from pathlib import Path

from benchmarks.gpu_check.common import Check

PARTS = ("correctness", "step", "linear", "training", "loss")


def table(results: Path) -> str:
    """What all parts found, one line for each row of each CSV file."""
    lines = []
    for path in sorted(results.glob("*.csv"), key=lambda path: (*PARTS, "parts").index(path.stem)):
        lines.append(f"--- {path.stem}")
        for row in csv.DictReader(path.open(newline="")):
            shown = {name: value for name, value in row.items() if value and name not in ("date", "device", "versions")}
            lines.append("  ".join(f"{name}={value}" for name, value in shown.items()))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "table"])
    parser.add_argument("--results", type=Path, required=True, help="the folder that CSV rows are appended in")
    parser.add_argument("--seconds", type=float, default=120, help="the part's share of the time")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes; on a CPU set TRITON_INTERPRET=1")
    parsed = parser.parse_args()
    if parsed.part == "table":
        print(table(parsed.results))
        return 0
    check = Check(parsed.part, parsed.results, parsed.seconds, parsed.rehearse)
    importlib.import_module(f"benchmarks.gpu_check.{parsed.part}").main(check)
    return 1 if check.failed else 0


if __name__ == "__main__":
    sys.exit(main())
