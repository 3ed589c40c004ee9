"""The main job in a few minutes on a CPU: does Stable-SPAM train a Llama in 4 bits better than AdamW?

    python examples/demo.py            # what `make demo` runs
    python examples/demo.py --smoke    # the same way through in a few steps, to see that it works

Three pretrainings of one tiny Llama (1.3 million parameters), with the same data, seed, steps and learning rate:
AdamW with gradient clipping in full precision, the same in 4 bits, and Stable-SPAM in 4 bits, all with ten times the
learning rate for the embedding, which is better for each of them. Each is a command line of `pretrain.py`. Prints a
table; writes `loss.png`, `report.html`, the logs and the trained models. Whoever wins, wins.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import pretrain

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator
from transformers.utils import logging

from hf_stablespam.monitor.report import write_report

STEPS = 200
SMOKE_STEPS = 12
EVALUATIONS = 20  # along each run, so that "steps to reach a loss" is known to 5 % of the run
BASELINE, CANDIDATE = "adamw_int4", "stable_spam_int4"


@dataclass(frozen=True)
class Run:
    """One of the three pretrainings: its folder, how it is called, and what sets it apart."""

    folder: str
    optimizer: str
    precision: str
    options: tuple[str, ...]
    color: str


RUNS = (
    Run("adamw", "AdamW + clipping", "full", ("--optim", "adamw_torch"), "#6b7280"),
    Run(BASELINE, "AdamW + clipping", "4-bit", ("--optim", "adamw_torch", "--four_bit", "int4"), "#d97706"),
    Run(
        CANDIDATE,
        "Stable-SPAM",
        "4-bit",
        ("--optim", "stable_spam", "--max_grad_norm", "0", "--four_bit", "int4"),
        "#2563eb",
    ),
)


def command_line(run: Run, output: Path, steps: int, seed: int) -> list[str]:
    """The arguments of `pretrain.py`; all but the run's own options are the same for the three."""
    schedule = {
        "--max_steps": steps,
        "--per_device_train_batch_size": 16,
        "--learning_rate": 3e-3,
        "--embedding_lr_scale": 10,
        "--warmup_steps": max(1, steps // 10),
        "--lr_scheduler_type": "cosine_with_min_lr",
        "--lr_scheduler_kwargs": json.dumps({"min_lr_rate": 0.1}),
        "--seed": seed,
        "--gradient_norms_by": "block",
        "--record_spikes": True,
        "--eval_strategy": "steps",
        "--eval_steps": max(2, steps // EVALUATIONS),
        "--max_eval_samples": 64,
        "--per_device_eval_batch_size": 32,
        "--logging_steps": max(1, steps // 50),
        "--save_strategy": "no",
        "--report_to": "none",
        "--dataloader_pin_memory": False,
        "--disable_tqdm": not sys.stderr.isatty(),
    }
    shared = [str(word) for pair in schedule.items() for word in pair]
    own = ["--output_dir", str(output / run.folder), "--model_size", "tiny", *run.options]
    return own + shared


def train(run: Run, output: Path, steps: int, seed: int) -> list[dict[str, float]]:
    """Runs one pretraining, with its log lines in `log.txt`; returns the Trainer's log history."""
    arguments = command_line(run, output, steps, seed)
    print(f"\n{run.optimizer}, {run.precision}\n$ python examples/pretrain.py {shlex.join(arguments)}", flush=True)
    folder = output / run.folder
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "w") as log, contextlib.redirect_stdout(log):
        pretrain.main(arguments)
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def series(history: list[dict[str, float]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of one logged quantity, each step once."""
    points = {row["step"]: row[key] for row in history if key in row}
    return list(points), list(points.values())


def steps_to_reach(history: list[dict[str, float]], loss: float) -> int | None:
    """The first evaluated step whose validation loss is at most `loss`; None when no evaluation got there."""
    evaluations = zip(*series(history, "eval_loss"), strict=True)
    return next((step for step, value in evaluations if value <= loss), None)


def table(histories: dict[str, list[dict[str, float]]]) -> str:
    """One line per run."""
    target = series(histories[BASELINE], "eval_loss")[1][-1]
    names = ("optimizer", "precision", "validation loss", "perplexity", f"steps to {target:.3f}", "seconds")
    rows = [names]
    for run in RUNS:
        history = histories[run.folder]
        loss, perplexity = (series(history, key)[1][-1] for key in ("eval_loss", "eval_perplexity"))
        reached = steps_to_reach(history, target)
        seconds = series(history, "train_runtime")[1][-1]
        figures = (f"{loss:.3f}", f"{perplexity:.1f}", str(reached or "not reached"), f"{seconds:.0f}")
        rows.append((run.optimizer, run.precision, *figures))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    header, *lines = ("  ".join(map(str.rjust, row, widths)) for row in rows)
    return "\n".join([header, "-" * len(header), *lines])


def summary(histories: dict[str, list[dict[str, float]]], steps: int) -> str:
    """The comparison in words, made from the numbers only."""
    baseline, candidate = (series(histories[name], "eval_loss")[1][-1] for name in (BASELINE, CANDIDATE))
    difference = candidate - baseline
    sentence = (
        f"In 4 bits Stable-SPAM ended at a validation loss of {candidate:.3f}, "
        f"{abs(difference):.3f} {'below' if difference < 0 else 'above'} AdamW's {baseline:.3f}"
    )
    reached = steps_to_reach(histories[CANDIDATE], baseline)
    if reached is None:
        return f"{sentence}; it did not reach AdamW's final loss within {steps} steps."
    return f"{sentence}, which it had reached after {reached} of {steps} steps."


def plot(histories: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Loss above (lines: validation, faint: training), gradient norm before stabilising below."""
    figure, (loss_axes, norm_axes) = plt.subplots(
        2, 1, figsize=(8, 7), sharex=True, height_ratios=(3, 2), layout="constrained"
    )
    for run in RUNS:
        history, label = histories[run.folder], f"{run.optimizer}, {run.precision}"
        loss_axes.plot(*series(history, "loss"), color=run.color, alpha=0.3, linewidth=1)
        steps, losses = series(history, "eval_loss")
        loss_axes.plot(steps, losses, color=run.color, linewidth=2, label=f"{label}: {losses[-1]:.3f}")
        norm_axes.plot(*series(history, "gradients/norm_max"), color=run.color, linewidth=1.2)
    loss_axes.set_title("Pretraining a tiny Llama: validation loss (faint: training loss)", loc="left")
    loss_axes.set_ylabel("loss (nats per token)")
    loss_axes.legend(title="final validation loss", frameon=False, alignment="left")
    norm_axes.set_title("Gradient norm before clipping: the largest since the log before", loc="left")
    norm_axes.set_yscale("log")
    norm_axes.set_xlabel("update step")
    norm_axes.set_ylabel("gradient norm")
    norm_axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (loss_axes, norm_axes):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("demo"), help="folder for figure, logs and models")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"update steps of each run; default {STEPS}")
    parser.add_argument("--smoke", action="store_true", help=f"only {SMOKE_STEPS} steps: to see that it works")
    parser.add_argument("--seed", type=int, default=42, help="of weights and data order; default 42")
    options = parser.parse_args(arguments)
    steps = SMOKE_STEPS if options.smoke else options.steps
    if steps < 2:
        parser.error(f"--steps must be at least 2, got {steps}")

    logging.disable_progress_bar()  # those of reading and writing models; the training's own stay
    histories = {run.folder: train(run, options.output_dir, steps, options.seed) for run in RUNS}
    plot(histories, options.output_dir / "loss.png")
    print(f"\n{table(histories)}\n\n{summary(histories, steps)}")
    print("The 4-bit arithmetic is simulated: the losses are those of 4-bit training, the seconds are not.")
    print(f"\nCurves: {options.output_dir / 'loss.png'}\nTrained model: {options.output_dir / CANDIDATE}")
    report = options.output_dir / "report.html"
    write_report([options.output_dir / run.folder for run in RUNS], report)
    print(f"Report, to open in a browser: {report.resolve()}")


if __name__ == "__main__":
    main()
