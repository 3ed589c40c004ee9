"""Class-incremental learning of ten digits: LAE against plain fine-tuning, by optimizer, precision and method.

    python benchmarks/continual.py            # every run that results/continual.csv does not have yet, then the tables
    python benchmarks/continual.py --table    # the tables from what is there

The runs are those of examples/continual_digits.py with its defaults but for what a row says: a small ViT, pretrained on
turned digits by AdamW in full precision, learns five tasks of two upright digits. Every answer (naive, or LAE's online,
offline and ensemble) gives a row: accuracy on all classes after the last task, its average over the tasks, forgetting.
Rows are appended one by one: what is interrupted goes on where it stopped.
"""

import argparse
import csv
import sys
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass, fields
from functools import lru_cache
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from continual_data import Task, digit_tasks
from continual_digits import ScriptArguments, learn, pretrained_vit
from torch import nn
from transformers import TrainingArguments

from benchmarks._record import RESULTS, append_rows
from hf_stablespam.recipes.lae import incremental_metrics

NAME = "continual"
SEEDS = (0, 1, 2)
FIGURES = ("last", "average", "forgetting")


@dataclass(frozen=True)
class Run:
    """What sets one sequence of tasks apart from the others."""

    algorithm: str  # naive or lae
    optimizer: str = "adamw_torch"
    precision: str = "full"
    method: str = "lora"
    freeze_epochs: int = 3
    calibrate: bool = True
    learning_rate: float = 2e-3
    pretraining_steps: int = 500
    seed: int = 0

    @property
    def key(self) -> tuple[str, ...]:
        return tuple(str(value) for value in astuple(self))


def all_runs(seeds: tuple[int, ...]) -> Iterator[Run]:
    """Seed by seed: optimizers and precisions, then LAE's parts, the methods, and a backbone that knows nothing."""
    for seed in seeds:
        for precision in ("full", "int4"):
            for optimizer in ("adamw_torch", "stable_spam"):
                for algorithm in ("naive", "lae"):
                    yield Run(algorithm, optimizer, precision, seed=seed)
        yield Run("lae", freeze_epochs=0, seed=seed)
        yield Run("lae", calibrate=False, seed=seed)
        for method in ("adapter", "prefix"):
            for algorithm in ("naive", "lae"):
                yield Run(algorithm, method=method, seed=seed)
        for algorithm in ("naive", "lae"):
            yield Run(algorithm, pretraining_steps=0, seed=seed)


@lru_cache(maxsize=1)
def start(seed: int, steps: int) -> tuple[nn.Module, list[Task]]:
    """The pretrained backbone and the tasks of a seed."""
    pretraining, tasks = digit_tasks(seed, classes_per_task=2)
    with TemporaryDirectory() as folder:
        return pretrained_vit(pretraining, steps, Path(folder), seed).vit, tasks


def rows_of(run: Run) -> list[dict[str, Any]]:
    """One row for each answer."""
    backbone, tasks = start(run.seed, run.pretraining_steps)
    script = ScriptArguments(
        method=run.method,
        num_freeze_epochs=run.freeze_epochs,
        calibrate=run.calibrate,
        four_bit=None if run.precision == "full" else run.precision,
    )
    with TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, optim=run.optimizer, learning_rate=run.learning_rate, seed=run.seed, num_train_epochs=6,
            per_device_train_batch_size=24, per_device_eval_batch_size=256, lr_scheduler_type="constant",
            max_grad_norm=0.0, disable_tqdm=True, save_strategy="no", logging_strategy="no", report_to="none",
            dataloader_pin_memory=False,
        )  # fmt: skip
        matrices = learn(backbone, tasks, args, script, naive=run.algorithm == "naive")
    sizes = [len(task.test) for task in tasks]
    rows = []
    for answer, matrix in matrices.items():
        figures = incremental_metrics(matrix, sizes)
        percent = {name: round(100 * value, 2) for name, value in zip(FIGURES, figures, strict=True)}
        curve = " ".join(
            f"{100 * incremental_metrics(matrix[:n], sizes[:n]).last:.1f}" for n in range(1, len(sizes) + 1)
        )
        rows.append({**asdict(run), "answer": answer, **percent, "accuracy_after_each_task": curve})
    return rows


def recorded() -> list[dict[str, str]]:
    path = RESULTS / f"{NAME}.csv"
    return list(csv.DictReader(path.open(newline=""))) if path.exists() else []


def cell(rows: list[dict[str, str]], run: Run, answer: str) -> str:
    """Last accuracy over the seeds, mean ± standard deviation; then the means of average accuracy and forgetting."""
    settings = {name: str(value) for name, value in asdict(run).items() if name not in ("seed", "algorithm")}
    found = [row for row in rows if row["answer"] == answer and settings.items() <= row.items()]
    if not found:
        return "–"
    last, average, forgetting = ([float(row[figure]) for row in found] for figure in FIGURES)
    spread = f" ± {stdev(last):.1f}" if len(found) > 1 else ""
    return f"{mean(last):.1f}{spread} / {mean(average):.1f} / {mean(forgetting):.1f}"


def missing(rows: list[dict[str, str]], runs: list[Run]) -> str:
    """How many of the runs are on record, where it is not all of them."""
    done = {tuple(row[each.name] for each in fields(Run)) for row in rows}
    count = sum(run.key in done for run in runs)
    return "" if count == len(runs) else f"So far {count} of {len(runs)} runs are on record.\n\n"


def table(rows: list[dict[str, str]]) -> str:
    """Optimizers and precisions: one line for each answer."""
    runs = [run for run in all_runs(SEEDS) if run.key[3:-1] == Run("lae").key[3:-1]]
    kinds = dict.fromkeys((run.optimizer, run.precision) for run in runs)
    names = {"adamw_torch": "AdamW", "stable_spam": "Stable-SPAM", "full": "", "int4": ", INT4 backbone"}
    lines = ["| | " + " | ".join(names[optimizer] + names[precision] for optimizer, precision in kinds) + " |"]
    lines.append("|---" * (len(kinds) + 1) + "|")
    for answer in ("naive", "online", "offline", "ensemble"):
        cells = [cell(rows, Run("", optimizer, precision), answer) for optimizer, precision in kinds]
        lines.append(f"| {answer} | " + " | ".join(cells) + " |")
    return missing(rows, runs) + "\n".join(lines)


def parts_table(rows: list[dict[str, str]]) -> str:
    """LAE with something left out or exchanged: one line for each."""
    variants = {
        "LoRA, as above": Run(""),
        "no frozen epochs": Run("", freeze_epochs=0),
        "no scalars": Run("", calibrate=False),
        "adapter beside the attention": Run("", method="adapter"),
        "prefix with compensation": Run("", method="prefix"),
        "backbone not pretrained": Run("", pretraining_steps=0),
    }
    wanted = {run.key[1:-1] for run in variants.values()}
    runs = [run for run in all_runs(SEEDS) if run.key[1:-1] in wanted]
    lines = ["| AdamW, full precision | naive | online | offline | ensemble |", "|---|---|---|---|---|"]
    for name, run in variants.items():
        cells = [cell(rows, run, answer) for answer in ("naive", "online", "offline", "ensemble")]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return missing(rows, runs) + "\n".join(lines)


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="only print the tables")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="default 0 1 2")
    options = parser.parse_args(command_line)
    if not options.table:
        done = {tuple(row[each.name] for each in fields(Run)) for row in recorded()}
        for run in all_runs(tuple(options.seeds)):
            if run.key not in done:
                append_rows(NAME, rows_of(run))
    print(f"Last accuracy / average accuracy / forgetting, %\n\n{table(recorded())}\n\n{parts_table(recorded())}")


if __name__ == "__main__":
    main()
