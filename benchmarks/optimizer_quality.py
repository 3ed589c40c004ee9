"""Which optimizer trains the demo's Llama best in INT4: each at three learning rates, then three seeds at its best.

    python benchmarks/optimizer_quality.py                                  # everything: about two hours on two cores
    python benchmarks/optimizer_quality.py --methods adamw stable_spam --steps 100 --seeds 1
    python benchmarks/optimizer_quality.py --table                          # only print what was measured

One row for each run is appended to results/optimizer_quality.csv as soon as it is done; runs that are there already
(same method, learning rate, seed and steps) are not repeated, so that an interrupted benchmark goes on. The table has
every method, whichever won.
"""

import argparse
import csv
import math
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[1]))

from corpus import Corpus, TokenBlocks, evenly_spaced, load_standard_library
from pretrain import llama
from stabilize_lion import Lion
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator, set_seed

from benchmarks._record import RESULTS, append_rows
from hf_stablespam import FourBitCallback, FourBitConfig, StabilizeCallback

BLOCK_SIZE = 128
NAME = "optimizer_quality"
TARGETS = r".*\.(self_attn|mlp)\..*_proj"


INT4 = FourBitConfig(weight="int4", activation="int4")


@dataclass(frozen=True)
class Method:
    """An optimizer as the Trainer's arguments ask for it, and the learning rates to try."""

    optim: str = "stable_spam"
    optim_args: str | None = None
    targets: str | None = None
    clip: float = 0.0  # the Trainer's own max_grad_norm
    lion: bool = False
    stabilized: bool = False
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    formats: FourBitConfig = INT4
    extra: dict[str, Any] = field(default_factory=dict)

    def callbacks(self) -> list[TrainerCallback]:
        four_bit = FourBitCallback(self.formats)
        return [four_bit, StabilizeCallback()] if self.stabilized else [four_bit]


GALORE = "rank=32,update_proj_gap=50,scale=0.25"
PLAIN = "clip_beta=none,norm_betas=none,reset_interval=none,decay_steps=none"
GALORE_RATES, LION_RATES = (3e-3, 1e-2, 3e-2), (1e-4, 3e-4, 1e-3)
METHODS = {
    "adamw": Method("adamw_torch"),
    "adamw_clipped": Method("adamw_torch", clip=1.0),
    "adamw_stabilized": Method("adamw_torch", stabilized=True),
    "spam": Method("spam", "reset_interval=100,warmup_steps=30", extra={"adam_epsilon": 1e-6}),
    "stable_spam": Method(optim_args="reset_interval=100"),
    "stable_spam_8bit": Method(optim_args="reset_interval=100,state_bits=8"),
    "stable_spam_4bit": Method(optim_args="reset_interval=100,state_bits=4"),
    "galore": Method(optim_args=f"{GALORE},{PLAIN}", targets=TARGETS, learning_rates=GALORE_RATES),
    "galore_stable_spam": Method(
        optim_args=f"{GALORE},reset_interval=100", targets=TARGETS, learning_rates=GALORE_RATES
    ),
    "lion": Method("sgd", lion=True, learning_rates=LION_RATES),
    "lion_clipped": Method("sgd", lion=True, clip=1.0, learning_rates=LION_RATES),
    "lion_stabilized": Method("sgd", lion=True, stabilized=True, learning_rates=LION_RATES),
}
# The formats that export and reload plainly, all trained alike: which one is to be the default?
FORMATS = {
    "format_int4": INT4,
    "format_int4_no_outliers": FourBitConfig(weight="int4", activation="int4", activation_outliers=0),
    "format_fp4_e1m2": FourBitConfig(weight="fp4_e1m2", activation="fp4_e1m2"),
    "format_mxfp4": FourBitConfig(weight="mxfp4", activation="mxfp4"),
    "format_nvfp4": FourBitConfig.nvfp4(),
    "format_nvfp4_4or6": FourBitConfig(weight="nvfp4", activation="nvfp4", four_over_six=True),
}
METHODS |= {name: Method(learning_rates=(3e-3,), formats=formats) for name, formats in FORMATS.items()}


def train(method: Method, corpus: Corpus, learning_rate: float, seed: int, steps: int) -> dict[str, float]:
    """One pretraining from its seed: validation loss, perplexity, seconds per step."""
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            optim=method.optim,
            optim_args=method.optim_args,
            optim_target_modules=method.targets,
            learning_rate=learning_rate,
            max_grad_norm=method.clip,
            max_steps=steps,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=32,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": 0.1},
            warmup_steps=max(1, steps // 10),
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **method.extra,
        )
        set_seed(seed)
        model = llama("tiny", corpus.tokenizer, BLOCK_SIZE)
        trainer = Trainer(
            model,
            arguments,
            train_dataset=TokenBlocks(corpus.train, BLOCK_SIZE),
            eval_dataset=evenly_spaced(TokenBlocks(corpus.validation, BLOCK_SIZE), 256),
            data_collator=default_data_collator,
            callbacks=method.callbacks(),
            optimizers=(Lion(model.parameters(), lr=learning_rate) if method.lion else None, None),
        )
        start = time.perf_counter()
        trainer.train()
        seconds = (time.perf_counter() - start) / steps
        loss = trainer.evaluate()["eval_loss"]
    return {"eval_loss": round(loss, 5), "seconds_per_step": round(seconds, 4)}


def measured(steps: int) -> dict[tuple[str, float, int], float]:
    """(method, learning rate, seed) → validation loss, of the runs of so many steps that are on record."""
    path = RESULTS / f"{NAME}.csv"
    if not path.exists():
        return {}
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if int(row["steps"]) == steps]
    return {(row["method"], float(row["learning_rate"]), int(row["seed"])): float(row["eval_loss"]) for row in rows}


def losses_at(name: str, rate: float, found: dict[tuple[str, float, int], float]) -> list[float]:
    """Validation losses of one method at one learning rate, over the seeds; a diverged run counts as infinite."""
    losses = [loss for (method, lr, _), loss in sorted(found.items()) if (method, lr) == (name, rate)]
    return [loss if math.isfinite(loss) else math.inf for loss in losses]


def best_rate(name: str, found: dict[tuple[str, float, int], float]) -> float:
    """The learning rate whose first seed ended lowest."""
    return min(METHODS[name].learning_rates, key=lambda rate: losses_at(name, rate, found)[:1] or [math.inf])


def table(steps: int) -> str:
    """What is on record for so many steps, the lowest mean first."""
    found = measured(steps)
    rows = []
    for name in sorted({method for method, _, _ in found}):
        rate = best_rate(name, found)
        losses = losses_at(name, rate, found)
        others = ", ".join(
            f"{r:g}: {losses_at(name, r, found)[0]:.3f}"
            for r in METHODS[name].learning_rates
            if r != rate and losses_at(name, r, found)
        )
        rows.append((statistics.fmean(losses), name, rate, losses, others))
    lines = [f"{'method':20s} {'lr':>7s} {'mean':>7s} {'lowest':>7s} {'highest':>7s}  seeds  other learning rates"]
    for mean, name, rate, losses, others in sorted(rows):
        lines.append(
            f"{name:20s} {rate:7g} {mean:7.3f} {min(losses):7.3f} {max(losses):7.3f}  {len(losses):5d}  {others}"
        )
    return "\n".join(lines)


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", type=int, default=300, help="update steps of each run")
    parser.add_argument("--seeds", type=int, default=3, help="seeds at the best learning rate")
    parser.add_argument("--table", action="store_true", help="run nothing")
    arguments = parser.parse_args(command_line)
    if not arguments.table:
        corpus = load_standard_library(2048)
        for name in arguments.methods:
            for rate in METHODS[name].learning_rates:
                record(name, corpus, rate, 42, arguments.steps)
            best = best_rate(name, measured(arguments.steps))
            for seed in range(43, 42 + arguments.seeds):
                record(name, corpus, best, seed, arguments.steps)
    print(table(arguments.steps))


def record(name: str, corpus: Corpus, rate: float, seed: int, steps: int) -> None:
    """Run once and append the row, unless it is there."""
    if (name, rate, seed) not in measured(steps):
        result = train(METHODS[name], corpus, rate, seed, steps)
        print(f"{name} lr={rate:g} seed={seed}: {result['eval_loss']:.4f}", flush=True)
        append_rows(NAME, [{"method": name, "learning_rate": rate, "seed": seed, "steps": steps, **result}])


if __name__ == "__main__":
    main()
