"""Repeats a small part of the committed evidence and compares: five minutes on two cores.

    python benchmarks/evidence_smoke.py

Trains the demo's comparison for a few steps and some of the digits' runs, as they are on record for this purpose, and
fails if a loss differs from the committed one by more than rounding makes it; draws the figures; and checks that the
documentation's tables are those of the committed results. The committed files stay as they are.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import evidence_page, outside_language, quality, quality_plots
from benchmarks.quality_runs import Run
from benchmarks.quality_studies import STUDIES

STEPS = 20
LOSS_TOLERANCE = 0.02  # other processors round otherwise, and 20 steps let that grow
DIGITS_TOLERANCE = 0.03  # of the test images: eleven of 360


def pairs() -> list[Run]:
    """The demo's three settings, one seed."""
    base = Run("stable_spam", "int4", 3e-3, steps=STEPS)
    return [run for run in STUDIES["pairs"](base, {}) if run.seed == base.seed]


def digits() -> list[outside_language.Run]:
    """The digits with strong anomalies, each optimizer once."""
    base = outside_language.Run("digits", 5.0, "adam", 3e-3, seed=0)
    return [replace(base, optimizer=optimizer) for optimizer in outside_language.OPTIMIZERS]


def compare(name: str, committed: float, repeated: float, tolerance: float) -> bool:
    """Prints one line; whether the two agree."""
    agrees = abs(committed - repeated) <= tolerance
    print(f"{name:40s} committed {committed:.4f} repeated {repeated:.4f} {'' if agrees else 'DIFFERS'}", flush=True)
    return agrees


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--record", action="store_true", help="first put what is to be compared on record")
    options = parser.parse_args(command_line)
    if options.record:
        quality.work(["pairs"], replace(pairs()[0], steps=STEPS), 1, 1, at_most=len(pairs()))
    evidence_page.main(["--check"])
    with tempfile.TemporaryDirectory() as folder:
        quality_plots.main(["--output", folder])
    trained, tested = quality.read_record(), outside_language.read_record()
    agree = [
        compare(
            f"{run.method}, {run.precision}", float(trained[run]["eval_loss"]), run.train()["eval_loss"], LOSS_TOLERANCE
        )
        for run in pairs()
    ]
    agree += [
        compare(
            f"digits, {run.optimizer}", tested[run], float(outside_language.train(run)["test_error"]), DIGITS_TOLERANCE
        )
        for run in digits()
    ]
    if not all(agree):
        sys.exit(f"{agree.count(False)} of {len(agree)} runs differ from the committed results")


if __name__ == "__main__":
    main()
