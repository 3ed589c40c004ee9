"""The tables of what an optimizer step costs, from the newest rows of `optimizer_step.csv`."""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path

from benchmarks._record import RESULTS

Row = dict[str, str]
SHOWN = {
    "StableSPAM": "StableSPAM with numba",
    "StableSPAM(without numba)": "StableSPAM without numba",
    "stabilize(AdamW(fused))": "`stabilize(AdamW(fused=True))`",
    "clip_grad_norm_ + AdamW(fused)": "clipping + fused AdamW",
}
MIDDLE, SMALL, LARGE = "33466880", "4003008", "134105856"  # parameters
FLOAT32, BFLOAT16 = "float32", "bfloat16"


def newest(optimizer: str, parameters: str, dtype: str = FLOAT32, processes: str = "1") -> Row:
    """The last row on a CPU."""
    wanted = {"optimizer": optimizer, "parameters": parameters, "dtype": dtype, "device": "cpu"}
    rows = [row for row in _rows(RESULTS / "optimizer_step.csv") if wanted.items() <= row.items()]
    return [row for row in rows if (row["processes"] or "1") == processes][-1]


def table() -> str:
    """Times fused AdamW, and times clipping with fused AdamW, for the sizes that many optimizers were run at."""
    lines = ["| | 33.5M in 75 tensors | 4.0M in 75 tensors |", "|---|---:|---:|"]
    for optimizer, name in SHOWN.items():
        lines.append(f"| {name} | {' | '.join(_ratios(newest(optimizer, size)) for size in (MIDDLE, SMALL))} |")
    row, more = newest("StableSPAM", MIDDLE), []
    for size, dtype, processes, what in (
        (LARGE, FLOAT32, "1", "134M parameters"),
        (MIDDLE, BFLOAT16, "1", "33.5M in bfloat16"),
        (MIDDLE, FLOAT32, "2", "33.5M under FSDP2, two processes of one thread"),
    ):
        more.append(f"{float(newest('StableSPAM', size, dtype, processes)['to_adamw']):.2f} for {what}")
    return (
        f"On {row['machine'].replace(', ', ' with ')}, medians of {row['repeats']} turns:\n\n"
        + "\n".join(lines)
        + "\n\n"
        f"With numba, times fused AdamW: {', '.join(more)}."
    )


def summary() -> str:
    """One sentence for README."""
    ours, other = newest("StableSPAM", MIDDLE), newest("StableSPAM(without numba)", MIDDLE)
    ratios = [f"{float(row[name]):.2f}" for row in (ours, other) for name in ("to_adamw", "to_clipped_adamw")]
    return (
        f"* On 2 CPU cores with numba (extra `cpu`, which `make demo` installs) one step for 33.5M parameters takes "
        f"{ratios[0]} times as long as PyTorch's fused AdamW and {ratios[1]} times as long as clipping with fused "
        f"AdamW, the Trainer's default; without numba {ratios[2]} and {ratios[3]} times (`optimizer_step.csv`): "
        "[docs/memory.md](docs/memory.md#what-a-step-costs-in-time)."
    )


@cache
def _rows(path: Path) -> tuple[Row, ...]:
    with path.open(newline="") as file:
        return tuple(csv.DictReader(file))


def _ratios(row: Row) -> str:
    return " ".join(
        text.format(float(row[name]))
        for name, text in (("to_adamw", "{:.2f}"), ("to_clipped_adamw", "({:.2f})"))
        if row[name]
    )
