"""Outside language models: forecasting series with anomalies, and handwritten digits, by Adam, SPAM and Stable-SPAM.

    python benchmarks/outside_language.py                    # what is missing: about 20 minutes on one core
    python benchmarks/outside_language.py --tasks digits     # one of the two
    python benchmarks/outside_language.py --table            # run nothing, print what is on record

Series: a PatchTST of transformers forecasts 24 values from 96 of four generated channels (three sines of random
period, a trend and noise). While training, a tenth of the input values gets noise from N(0, severity · max|x|), as in
the paper's figure 9; the test series are clean. Digits: a small convolutional network on scikit-learn's 8 × 8 images,
with the same noise. Each optimizer runs at four learning rates, then with 5 seeds at its best.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, astuple, dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PatchTSTConfig, PatchTSTForPrediction

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import _record
from benchmarks.quality_tables import markdown, number
from hf_stablespam.optim import SPAM, StableSPAM

NAME = "outside_language"
SEVERITIES = (0.0, 2.0, 5.0)
ANOMALIES = 0.1
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
SEEDS = range(5)
OPTIMIZERS = ("adam", "spam", "stable_spam")
CHANNELS, PAST, FUTURE = 4, 96, 24


@dataclass(frozen=True)
class Run:
    """One training; two equal runs are the same row of the record."""

    task: str
    severity: float
    optimizer: str
    learning_rate: float
    seed: int
    steps: int = 300

    @classmethod
    def from_row(cls, row: dict[str, str]) -> Run:
        types = {"task": str, "optimizer": str, "seed": int, "steps": int}
        return cls(**{each.name: types.get(each.name, float)(row[each.name]) for each in fields(cls)})


@dataclass(frozen=True)
class Task:
    """Data, a model, its loss while training and its error on clean test data (less is better)."""

    data: Callable[[int], tuple[Tensor, Tensor, Tensor, Tensor]]  # train inputs, targets, test inputs, targets
    model: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]
    error: Callable[[nn.Module, Tensor, Tensor], Tensor]
    measure: str


def series(seed: int, windows: int = 1000) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Windows of generated channels, cut from the first (training) and the last tenth (test) of one long series."""
    generator = torch.Generator().manual_seed(seed)
    time_axis = torch.arange(6000.0)
    channels = []
    for _ in range(CHANNELS):
        period, phase, size = torch.rand(3, 3, generator=generator)
        sines = torch.sin(2 * math.pi * (time_axis[:, None] / (8 + 56 * period) + phase)) * (0.3 + size)
        trend = 1e-4 * torch.randn(1, generator=generator) * time_axis
        channels.append(sines.sum(1) + trend + 0.1 * torch.randn(len(time_axis), generator=generator))
    values = torch.stack(channels, 1)  # (time, channels)
    length, split = PAST + FUTURE, 5000
    starts = torch.randint(0, split - length, (windows,), generator=generator).tolist()
    train = torch.stack([values[start : start + length] for start in starts])
    test = torch.stack([values[start : start + length] for start in range(split, 6000 - length, 8)])
    return train[:, :PAST], train[:, PAST:], test[:, :PAST], test[:, PAST:]


def patch_tst() -> nn.Module:
    return PatchTSTForPrediction(
        PatchTSTConfig(
            num_input_channels=CHANNELS,
            context_length=PAST,
            prediction_length=FUTURE,
            patch_length=12,
            patch_stride=12,
            d_model=32,
            num_attention_heads=4,
            num_hidden_layers=2,
            ffn_dim=64,
        )
    )


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's digits, four fifths of them for training."""
    from sklearn.datasets import load_digits  # here, so that the series need no scikit-learn

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(bunch.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train, test = order[: len(order) * 4 // 5], order[len(order) * 4 // 5 :]
    return images[train], labels[train], images[test], labels[test]


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


TASKS = {
    "series": Task(
        series,
        patch_tst,
        loss=lambda model, past, future: model(past_values=past, future_values=future).loss,
        error=lambda model, past, future: (model(past_values=past).prediction_outputs - future).square().mean(),
        measure="mean squared error",
    ),
    "digits": Task(
        digits,
        convolutions,
        loss=lambda model, images, labels: cross_entropy(model(images), labels),
        error=lambda model, images, labels: (model(images).argmax(1) != labels).float().mean(),
        measure="share of wrong digits",
    ),
}


def optimizer_for(run: Run, model: nn.Module) -> torch.optim.Optimizer:
    """As the paper compares them: the resets in proportion to the length of the run."""
    reset, rate = run.steps // 2, run.learning_rate
    if run.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=rate)
    if run.optimizer == "spam":
        return SPAM(model.parameters(), lr=rate, reset_interval=reset, warmup_steps=max(1, run.steps // 10))
    return StableSPAM(model.parameters(), lr=rate, reset_interval=reset, decay_steps=run.steps)


def with_anomalies(inputs: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """A tenth of the values gets noise of `severity` times the largest magnitude of the batch."""
    hit = torch.rand(inputs.shape, generator=generator) < ANOMALIES
    noise = torch.randn(inputs.shape, generator=generator) * severity * inputs.abs().max()
    return inputs + noise * hit


def train(run: Run) -> dict[str, object]:
    """One training; the row of the record."""
    task = TASKS[run.task]
    inputs, targets, test_inputs, test_targets = task.data(run.seed)
    torch.manual_seed(run.seed)
    model = task.model()
    optimizer = optimizer_for(run, model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, run.steps)
    generator = torch.Generator().manual_seed(run.seed)
    start = time.perf_counter()
    for _ in range(run.steps):
        batch = torch.randint(0, len(inputs), (64,), generator=generator)
        loss = task.loss(model, with_anomalies(inputs[batch], run.severity, generator), targets[batch])
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - start
    model.eval()
    with torch.no_grad():
        error = task.error(model, test_inputs, test_targets).item()
    return asdict(run) | {"test_error": f"{error:.6g}", "seconds": round(seconds, 2)}


def read_record() -> dict[Run, float]:
    """Every run on record with its test error."""
    path = _record.RESULTS / f"{NAME}.csv"
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {Run.from_row(row): float(row["test_error"]) for row in csv.DictReader(file)}


def asked_for(tasks: list[str], steps: int, record: dict[Run, float]) -> Iterator[Run]:
    """All learning rates, and the seeds at the one whose first seed erred least."""
    for task in tasks:
        for severity in SEVERITIES:
            for optimizer in OPTIMIZERS:
                first = [Run(task, severity, optimizer, rate, SEEDS[0], steps) for rate in RATES]
                yield from first
                if all(run in record for run in first):
                    best = min(first, key=lambda run: record[run])
                    yield from (replace(best, seed=seed) for seed in SEEDS)


def work(tasks: list[str], steps: int, at_most: int | None) -> None:
    """Run what is missing, one after the other."""
    made = 0
    while at_most is None or made < at_most:
        record = read_record()
        run = next((run for run in asked_for(tasks, steps, record) if run not in record), None)
        if run is None:
            return
        _record.append_rows(NAME, [train(run)])
        made += 1


def at_best_rate(
    task: str, severity: float, optimizer: str, record: dict[Run, float], steps: int
) -> tuple[float, dict[int, float]]:
    """The learning rate whose first seed erred least, and the error of each seed there."""
    found = [run for run in record if astuple(run)[:3] == (task, severity, optimizer) and run.steps == steps]
    first = [run for run in found if run.seed == SEEDS[0]]
    if not first:
        return math.nan, {}
    rate = min(first, key=lambda run: record[run]).learning_rate
    return rate, {run.seed: record[run] for run in found if run.learning_rate == rate}


def table(task: str, record: dict[Run, float], steps: int) -> str:
    """Severity by optimizer; each seed has its own data, so that it is compared with Adam's error on the same seed."""
    rows = []
    for severity in SEVERITIES:
        _, adam = at_best_rate(task, severity, "adam", record, steps)
        for optimizer in OPTIMIZERS:
            rate, errors = at_best_rate(task, severity, optimizer, record, steps)
            if errors:
                ratios = [error / adam[seed] for seed, error in errors.items() if adam.get(seed)]
                figures = (f"{rate:g}", str(len(errors)), *_mean_and_spread([*errors.values()], 4))
                rows.append((f"{severity:g}", f"`{optimizer}`", *figures, *_mean_and_spread(ratios, 2)))
    return markdown(("severity", "optimizer", "lr", "seeds", TASKS[task].measure, "± std", "÷ Adam's", "± std"), rows)


def _mean_and_spread(values: list[float], digits: int) -> tuple[str, str]:
    mean = statistics.fmean(values) if values else math.nan
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    return number(mean, digits), number(spread, digits)


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="default: both")
    parser.add_argument("--steps", type=int, default=300, help="update steps of each run")
    parser.add_argument("--at_most", type=int, default=None, help="stop after so many runs")
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args(command_line)
    if not options.table:
        work(options.tasks, options.steps, options.at_most)
    for task in options.tasks:
        print(f"### {task}\n\n{table(task, read_record(), options.steps)}\n")


if __name__ == "__main__":
    main()
