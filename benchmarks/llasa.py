"""Llasa's two scalings on real, synthetic speech: steps of training, and candidates at inference.

    python benchmarks/llasa.py            # what is missing: about 7 minutes on one core
    python benchmarks/llasa.py --table    # run nothing, print what is on record
    python benchmarks/llasa.py --plot docs/images/llasa.png

The task is that of examples/speak.py: espeak-ng says three digits in two voices, a Llama of 0.36 million parameters
learns text → codes, and a judge that shares no recording with the verifiers listens to the audio. Training: the
held-out loss and the judge's verdict on one sample after 75, 150 and 300 steps, each a whole run, and at 300 steps
AdamW with clipping. Inference: the model of 300 steps in INT4, 12 unheard texts. Three seeds,
each with recordings, codec and listeners of its own.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import speak
from speak import CANDIDATES
from speech.methods import METHODS, Method, best_of, results
from speech.studio import Sizes, Studio, build
from transformers import TrainingArguments

from benchmarks import _record
from benchmarks.quality_tables import markdown

NAME = "llasa"
SEEDS = (0, 1, 2)
STEPS = (75, 150, 300)
SIZES = Sizes(tests=12)
MAIN = ("stable_spam", "int4", 300)
TRAININGS = (
    *(("stable_spam", "int4", steps) for steps in STEPS),
    ("adamw_torch", "int4", 300),
)
KEY = ("seed", "optimizer", "layers", "steps", "method")


def inference_methods() -> dict[str, tuple[int, Method]]:
    """Method → candidates that it draws in a step, and how."""
    by_content = {f"best of {n}, content": (n, best_of(n, "content")) for n in CANDIDATES if n > 1}
    rest = {name: (16, method) for name, method in METHODS.items() if name != "one sample" and name not in by_content}
    return {**by_content, **rest}


def train(studio: Studio, seed: int, optimizer: str, layers: str, steps: int) -> tuple[Any, float]:
    """The model and its held-out loss."""
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            optim=optimizer,
            max_grad_norm=0.0 if optimizer == "stable_spam" else 1.0,
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            warmup_steps=20,
            max_steps=steps,
            per_device_train_batch_size=16,
            logging_steps=50,
            save_strategy="no",
            report_to=[],
            remove_unused_columns=False,
            disable_tqdm=True,
            use_cpu=True,
            seed=seed,
        )
        trainer = speak.train(studio, args, None if layers == "full precision" else layers)
        return trainer.model, trainer.evaluate()["eval_loss"]


def on_record() -> list[dict[str, str]]:
    path = _record.RESULTS / f"{NAME}.csv"
    return list(csv.DictReader(path.open(newline=""))) if path.exists() else []


def rows_of(seed: int) -> Iterator[dict[str, Any]]:
    """What is missing of one seed, a row at a time."""
    done = {tuple(row[name] for name in KEY) for row in on_record()}
    methods = inference_methods()

    def is_missing(training: tuple[str, str, int], method: str) -> bool:
        return tuple(map(str, (seed, *training, method))) not in done

    def wanted(training: tuple[str, str, int]) -> list[str]:
        names = ["one sample", *(methods if training == MAIN else ())]
        return [name for name in names if is_missing(training, name)]

    if not any(wanted(training) for training in TRAININGS):
        return
    studio = build(seed, SIZES)
    for training in TRAININGS:
        if not wanted(training):
            continue
        model, loss = train(studio, seed, *training)
        for name in wanted(training):
            candidates, method = methods.get(name, (1, METHODS["one sample"]))
            found, means = results(model, studio, method, studio.tests, seed)
            finished = sum(result.finished for result in found) / len(found)
            yield {
                **dict(zip(KEY, (seed, *training, name), strict=True)),
                "candidates": candidates,
                "texts": len(found),
                "source": studio.source,
                "parameters": model.num_parameters(),
                "eval_loss": round(loss, 4),
                "wrong_words": round(means["error"], 4),
                "voice": round(means["voice"], 4),
                "finished": finished,
                "cpu_seconds_a_text": round(means["seconds"], 3),
            }


def groups(rows: list[dict[str, str]]) -> dict[tuple[str, ...], list[dict[str, str]]]:
    """Rows of all seeds of the same training and method, in the order of the record."""
    found: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in KEY[1:]), []).append(row)
    return found


def spread(rows: list[dict[str, str]], column: str, factor: float = 1.0, digits: int = 2) -> str:
    """Mean and each seed: three seeds need no standard deviation to be seen."""
    values = [factor * float(row[column]) for row in rows]
    return f"{statistics.mean(values):.{digits}f} ({', '.join(f'{value:.{digits}f}' for value in values)})"


def tables() -> str:
    found = groups(on_record())
    training, inference = [], []
    for (optimizer, layers, steps, method), rows in found.items():
        if method == "one sample":
            loss, wrong = spread(rows, "eval_loss", digits=3), spread(rows, "wrong_words", 100, 1)
            training.append((optimizer, layers, steps, loss, wrong))
        if (optimizer, layers, int(steps)) == MAIN:
            voice, seconds = spread(rows, "voice"), spread(rows, "cpu_seconds_a_text")
            candidates = rows[0]["candidates"]
            inference.append((method, candidates, spread(rows, "wrong_words", 100, 1), voice, seconds))
    trained = markdown(
        ("optimizer", "linear layers", "steps", "held-out loss", "wrong words of one sample, %"), training
    )
    searched = markdown(("method", "candidates", "wrong words, %", "voice asked for", "CPU seconds a text"), inference)
    return f"{trained}\n\n{searched}"


def plot(path: str) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    found = groups(on_record())
    for seed in SEEDS:
        mine = {key: row for key, rows in found.items() for row in rows if int(row["seed"]) == seed}
        steps = [mine["stable_spam", "int4", str(n), "one sample"] for n in STEPS]
        left.plot(STEPS, [float(row["eval_loss"]) for row in steps], marker="o", label=f"seed {seed}")
        main = {key[3]: row for key, row in mine.items() if (key[0], key[1], int(key[2])) == MAIN}
        names = {1: "one sample", **{n: f"best of {n}, content" for n in CANDIDATES if n > 1}}
        errors = [100 * float(main[name]["wrong_words"]) for name in names.values()]
        middle.plot(list(names), errors, marker="o", label=f"seed {seed}")
    styles = {
        "one sample": "o",
        "best of 16, content": "s",
        "best of 16, voice": "^",
        "best of 16, both": "D",
        "process search, voice": "v",
        "process search to 12 codes, then content": "*",
    }
    for name, marker in styles.items():
        rows = found[(*map(str, MAIN), name)]
        x, y = [float(row["voice"]) for row in rows], [100 * float(row["wrong_words"]) for row in rows]
        right.scatter(x, y, marker=marker, s=60, label=name, alpha=0.8)
    left.set(xscale="log", xlabel="steps of training", ylabel="held-out loss", title="train time")
    left.set_xticks(STEPS, map(str, STEPS), minor=False)
    left.minorticks_off()
    middle.set(xscale="log", xlabel="candidates, best by content", ylabel="wrong words, %", title="inference time")
    middle.set_xticks(list(names), map(str, names))
    middle.minorticks_off()
    right.set(xlabel="share of frames in the voice asked for", ylabel="wrong words, %", title="who chooses what")
    left.legend(fontsize=8)
    right.legend(fontsize=7)
    for axis in (left, middle, right):
        axis.set_ylim(bottom=0 if axis is not left else None)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", action="store_true", help="run nothing, print what is on record")
    parser.add_argument("--plot", metavar="PNG", help="run nothing, draw what is on record")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    options = parser.parse_args()
    if options.plot:
        plot(options.plot)
    elif not options.table:
        torch.set_num_threads(1)
        for seed in options.seeds:
            for row in rows_of(seed):
                print(row, flush=True)
                _record.append_rows(NAME, [row])
    print(tables())


if __name__ == "__main__":
    main()
