"""What GradientNormCallback and SpikeRecorder add to a training step of the demo's model, in 4 bits on the CPU.

    OMP_NUM_THREADS=1 python benchmarks/gradient_norm_callback.py    # appends to results/gradient_norm_callback.csv

One Trainer has all callbacks, and they take turns step by step: first none, then one after the other, and again. Times
are CPU times of the process, which other programs on the machine change less than time on the clock. Two figures come
out: `added_percent`, the median step with the callback against the median step without any, and `inside_percent`, the
time inside the callback's methods against the rest of the time of its steps, logs included. The first sees everything,
the second is less noisy.
"""

from __future__ import annotations

import argparse
import csv
import functools
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_stablespam import FourBitCallback, FourBitConfig, GradientNormCallback, SpikeRecorder

RESULTS = Path(__file__).parent / "results" / "gradient_norm_callback.csv"
BATCH, LENGTH, VOCABULARY = 16, 128, 2048
VARIANTS: dict[str, Callable[[], TrainerCallback]] = {
    "nothing": TrainerCallback,
    "global": GradientNormCallback,
    "block": lambda: GradientNormCallback(by="block"),
    "tensor": lambda: GradientNormCallback(by="tensor"),
    "global, entry scores": lambda: GradientNormCallback(spike_score="entry"),
    "recorder": SpikeRecorder,
}
LOGGING_STEPS = 5  # has no divisor in common with the number of variants, so that each has its share of logs
EVENTS = ("on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_log")


class Tokens(Dataset):
    """Random tokens in the demo's shape; what they are does not matter for the time."""

    def __init__(self, rows: int) -> None:
        self.tokens = torch.randint(VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


class Turns(TrainerCallback):
    """Gives each callback its turn, one step long, and measures the steps and what of them was inside the callback."""

    def __init__(self, callbacks: dict[str, TrainerCallback]) -> None:
        self.names = list(callbacks)
        self.steps: dict[str, list[float]] = {name: [] for name in self.names}
        self.inside = dict.fromkeys(self.names, 0.0)
        self.now = ""
        for name, callback in callbacks.items():
            for event in EVENTS:
                setattr(callback, event, self.in_turn(name, getattr(callback, event)))

    def in_turn(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def run(*args: Any, **kwargs: Any) -> None:
            if name == self.now:
                start = time.process_time()
                method(*args, **kwargs)
                self.inside[name] += time.process_time() - start

        return run

    def on_step_begin(self, args, state, control, **kwargs):
        now = time.process_time()
        if self.now:
            self.steps[self.now].append(now - self.start)  # with the log that may follow a step
        self.now, self.start = self.names[state.global_step % len(self.names)], now
        if state.global_step < len(self.names):  # every callback's first step sets it up
            self.steps = {name: [] for name in self.names}
            self.inside = dict.fromkeys(self.names, 0.0)


def demo_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=4, use_cache=False, **shape))


def measure(optim: str, rounds: int) -> list[dict[str, Any]]:
    """One row for each variant."""
    callbacks = {name: make() for name, make in VARIANTS.items()}
    turns = Turns(callbacks)
    steps = len(VARIANTS) * (rounds + 1) + 1
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            optim=optim,
            max_grad_norm=0.0,
            per_device_train_batch_size=BATCH,
            max_steps=steps,
            logging_steps=LOGGING_STEPS,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(
            model=demo_model(),
            args=arguments,
            train_dataset=Tokens(BATCH * steps),
            callbacks=[FourBitCallback(FourBitConfig()), turns, *callbacks.values()],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    plain = statistics.median(turns.steps["nothing"])
    return [
        {
            "optim": optim,
            "variant": name,
            "step_cpu_ms": round(1e3 * statistics.median(times), 2),
            "added_percent": round(100 * (statistics.median(times) / plain - 1), 2),
            "inside_percent": round(100 * turns.inside[name] / (sum(times) - turns.inside[name]), 2),
        }
        for name, times in turns.steps.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--optim", nargs="+", default=["stable_spam", "adamw_torch"])
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    common = {
        "rounds": options.rounds,
        "logging_steps": LOGGING_STEPS,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    rows = [row | common for optim in options.optim for row in measure(optim, options.rounds)]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    is_new = not options.output.exists()
    with options.output.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        if is_new:
            writer.writeheader()
        writer.writerows(rows)
    shown = ("optim", "variant", "step_cpu_ms", "added_percent", "inside_percent")
    for row in rows:
        print(*(f"{row[name]!s:>20}" for name in shown))


if __name__ == "__main__":
    main()
