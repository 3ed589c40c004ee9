"""What GradientNormCallback and SpikeRecorder add to a training step of the demo's model, in 4 bits on the CPU.

    OMP_NUM_THREADS=1 python benchmarks/gradient_norm_callback.py    # appends to results/gradient_norm_callback.csv

Variants take turns: in each round every one of them trains for some steps with one log. Times are CPU times of the
process, which other programs on the machine hardly change. Two figures are kept, medians over the rounds:
`added_percent`, by how much a round took longer than the round without callback beside it, and `inside_percent`, the
part of the time that was spent inside the callbacks' methods. The first sees everything, the second is less noisy.
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
VARIANTS: dict[str, Callable[[], list[TrainerCallback]]] = {
    "nothing": list,
    "global": lambda: [GradientNormCallback()],
    "block": lambda: [GradientNormCallback(by="block")],
    "tensor": lambda: [GradientNormCallback(by="tensor")],
    "global, entry scores": lambda: [GradientNormCallback(spike_score="entry")],
    "recorder": lambda: [SpikeRecorder()],
}
EVENTS = ("on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_optimizer_step", "on_log")


class Tokens(Dataset):
    """Random tokens in the demo's shape; what they are does not matter for the time."""

    def __init__(self, rows: int) -> None:
        self.tokens = torch.randint(VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


class Clock(TrainerCallback):
    """CPU time from the begin of the second step to that of the last, and what of it was inside `callbacks`."""

    def __init__(self, steps: int, callbacks: list[TrainerCallback]) -> None:
        self.steps, self.inside, self.running = steps, 0.0, False
        for callback in callbacks:
            for event in EVENTS:
                if hasattr(callback, event):
                    setattr(callback, event, self.timed(getattr(callback, event)))

    def timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            result = method(*args, **kwargs)
            self.inside += (time.process_time() - start) * self.running
            return result

        return run

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.start, self.running = time.process_time(), True
        elif state.global_step == self.steps + 1:
            self.seconds, self.running = time.process_time() - self.start, False


def demo_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=4, use_cache=False, **shape))


def one_round(variant: str, optim: str, steps: int) -> Clock:
    """Train for `steps` steps with one log among them, after one step of warming up."""
    callbacks = VARIANTS[variant]()
    clock = Clock(steps, callbacks)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            optim=optim,
            max_grad_norm=0.0,
            per_device_train_batch_size=BATCH,
            max_steps=steps + 2,
            logging_steps=steps,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(
            model=demo_model(),
            args=arguments,
            train_dataset=Tokens(BATCH * (steps + 2)),
            callbacks=[FourBitCallback(FourBitConfig()), *callbacks, clock],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return clock


def measure(optim: str, rounds: int, steps: int) -> list[dict[str, Any]]:
    """One row for each variant."""
    clocks: dict[str, list[Clock]] = {variant: [] for variant in VARIANTS}
    for index in range(rounds):
        # Forwards and backwards, so that none is always measured after the same other.
        for variant in list(VARIANTS)[:: 1 if index % 2 else -1]:
            clocks[variant].append(one_round(variant, optim, steps))
    plain = [clock.seconds for clock in clocks["nothing"]]
    return [
        {
            "optim": optim,
            "variant": variant,
            "step_cpu_ms": round(1e3 * statistics.median(clock.seconds for clock in found) / steps, 2),
            "added_percent": round(
                100 * (statistics.median(c.seconds / p for c, p in zip(found, plain, strict=True)) - 1), 2
            ),
            "inside_percent": round(100 * statistics.median(clock.inside / clock.seconds for clock in found), 2),
        }
        for variant, found in clocks.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=10, help="steps of a round, and between two logs")
    parser.add_argument("--optim", nargs="+", default=["stable_spam", "adamw_torch"])
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    common = {
        "rounds": options.rounds,
        "steps": options.steps,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    rows = [row | common for optim in options.optim for row in measure(optim, options.rounds, options.steps)]
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
