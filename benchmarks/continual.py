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


def print_tables(rows: list[dict[str, str]]) -> None:
    """Mean and standard deviation over the seeds, in percent."""
    settings = [each.name for each in fields(Run) if each.name not in ("seed", "algorithm")]
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault((*(row[name] for name in settings), row["answer"]), []).append(row)
    print("| " + " | ".join([*settings, "answer", "seeds", *FIGURES]) + " |")
    print("|---" * (len(settings) + 2 + len(FIGURES)) + "|")
    for key, members in groups.items():
        cells = []
        for figure in FIGURES:
            values = [float(row[figure]) for row in members]
            cells.append(f"{mean(values):.1f} ± {stdev(values) if len(values) > 1 else 0:.1f}")
        print("| " + " | ".join([*key, str(len(members)), *cells]) + " |")


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
    print_tables(recorded())


if __name__ == "__main__":
    main()
