"""The record of the real model's study: what sets its runs apart, and the rows."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from benchmarks import _queue
from hf_stablespam import FourBitConfig

NAME, FILES = "qat_smollm2", Path("runs/qat_smollm2")
STEPS, WARM_UP, EVALUATIONS = 40, 4, 4
LONGER = 2.5  # times the steps, with rates and seeds of their own
WINDOWS = 20  # of 128 held-out tokens, from all over the pages
RATES, SEEDS = (2e-4, 4e-4, 1e-4), (0, 1, 2)
SMALLEST, LARGEST = 2.5e-5, 1.6e-3  # where the search for the best rate ends
FULL, GGUF = "full", "int4_signed_g32"
FORMATS = {
    GGUF: FourBitConfig.gguf(),
    "w4a4_int4_g64": FourBitConfig("int4", "int4", group_size=64),
    "nvfp4": FourBitConfig.nvfp4(),
    "mxfp4": FourBitConfig("mxfp4", "mxfp4"),
}
LOADED = "loaded"


@dataclass(frozen=True)
class Run:
    """What sets one training apart; `precision` is that of the forward pass in training."""

    method: str
    precision: str
    learning_rate: float
    seed: int = SEEDS[0]
    steps: int = STEPS

    @classmethod
    def from_row(cls, row: dict[str, str]) -> Run:
        """The run that a row of the CSV describes."""
        types = {"learning_rate": float, "seed": int, "steps": int}
        return cls(**{each.name: types.get(each.name, str)(row[each.name]) for each in fields(cls)})


Record = dict[Run, dict[str, str]]


def read_record() -> Record:
    """Every run on record, with its row."""
    return _queue.read_record(NAME, Run.from_row)


def perplexity_of(record: Record, run: Run) -> float:
    return float(record[run]["perplexity"])
