"""FuseChat-3.0 on the toy of `examples/fuse_models.py`, with what its parts are worth, three seeds.

python benchmarks/fusechat_toy.py            # what is missing: about 4 minutes a seed on one core
python benchmarks/fusechat_toy.py --table    # run nothing, print what is on record
"""

from __future__ import annotations

import argparse
import csv
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import fuse_models as toy
from datasets import Dataset, DatasetDict

from benchmarks import _record
from benchmarks.quality_tables import markdown
from hf_stablespam import FourBitConfig, convert_to_4bit
from hf_stablespam.recipes.fusechat import build_preference_dataset, train_target

NAME = "fusechat_toy"
SEEDS = (0, 1, 2)
FOUR_BIT = FourBitConfig("int4", "int4", group_size=32)
ADAMW = {"optim": "adamw_torch", "max_grad_norm": 1.0}


@dataclass(frozen=True)
class Training:
    """One way to train the target.

    Args:
        stages: what is measured: the model after SFT, after DPO, or both.
        data: scored answers and seed → the two data sets.
        four_bit: for both stages.
        sft: options of the first stage.
        dpo: options of the second.
        begin: the training whose SFT model this one begins from; None: its own.
    """

    stages: tuple[str, ...] = ("sft", "dpo")
    data: Callable[[Dataset, int], DatasetDict] = lambda scored, seed: build_preference_dataset(scored)
    four_bit: FourBitConfig | None = None
    sft: dict[str, Any] = field(default_factory=dict)
    dpo: dict[str, Any] = field(default_factory=dict)
    begin: str | None = None


def with_fraction(fraction: float) -> Callable[[Dataset, int], DatasetDict]:
    return lambda scored, seed: build_preference_dataset(scored, sft_fraction=fraction)


def random_answers(scored: Dataset, seed: int) -> DatasetDict:
    """The prompts of the SFT part, each with a random answer instead of the best."""
    data, draw = build_preference_dataset(scored), random.Random(seed)
    answers: dict[str, list[str]] = {}
    for prompt, response in zip(scored["prompt"][:], scored["response"][:], strict=True):
        answers.setdefault(prompt, []).append(response)
    completions = [draw.choice(answers[prompt]) for prompt in data["sft"]["prompt"][:]]
    sft = data["sft"].remove_columns("completion").add_column("completion", completions)
    return DatasetDict(sft=sft, dpo=data["dpo"].select([]))


TRAININGS = {
    "Stable-SPAM": Training(),
    "Stable-SPAM, 4 bits": Training(four_bit=FOUR_BIT),
    "AdamW": Training(sft=ADAMW, dpo=ADAMW),
    "AdamW, 4 bits": Training(four_bit=FOUR_BIT, sft=ADAMW, dpo=ADAMW),
    "SFT on random answers": Training(("sft",), random_answers),
    "SFT on the best answers of all prompts, 300 steps": Training(("sft",), with_fraction(1.0), sft={"max_steps": 300}),
    "DPO without SFT, lr 3e-5": Training(("dpo",), with_fraction(0.0), dpo={"learning_rate": 3e-5}),
    "DPO at lr 1e-4": Training(("dpo",), dpo={"learning_rate": 1e-4}, begin="Stable-SPAM"),
}
UNTRAINED = ("best source", "target")
ROWS = [(name, "") for name in UNTRAINED] + [(name, stage) for name, each in TRAININGS.items() for stage in each.stages]


def run_seed(seed: int, missing: set[tuple[str, str]], folder: Path) -> None:
    """Teach, sample, and train the target in each way that is missing; a row of the record for each stage."""
    sizes, tokenizer, draw = toy.Sizes(), toy.letters_tokenizer(), random.Random(seed)
    sources, target = toy.teach(sizes, tokenizer, seed, folder)
    target.save_pretrained(folder / "target")
    prompts, held_out = toy.make_prompts(sizes.prompts, draw), toy.make_prompts(sizes.held_out, draw)

    def measured(name: str, stage: str, model: Any, seconds: float = 0.0) -> None:
        if (name, stage) in missing:
            reward, malformed = toy.measure(model, tokenizer, held_out)
            row = {"training": name, "stage": stage, "seed": seed, "prompts": sizes.prompts}
            row |= {"reward_percent": round(reward, 2), "malformed_percent": round(malformed, 2)}
            _record.append_rows(NAME, [{**row, "seconds": round(seconds, 1)}])

    measured("best source", "", max(sources.values(), key=lambda model: toy.measure(model, tokenizer, held_out)))
    measured("target", "", target)
    scored = toy.scored_answers(sources, tokenizer, prompts, seed)
    for name, training in TRAININGS.items():
        if not any((name, stage) in missing for stage in training.stages):
            continue
        start = time.monotonic()
        sft_args, _ = toy.toy_settings(folder / (training.begin or name), sizes, seed, sft=training.sft)
        _, dpo_args = toy.toy_settings(folder / name, sizes, seed, dpo=training.dpo)
        model, data = type(target).from_pretrained(folder / "target"), training.data(scored, seed)
        model = train_target(model, tokenizer, data, sft_args, dpo_args, four_bit=training.four_bit, resume=True)
        seconds = time.monotonic() - start
        if "sft" in training.stages:
            first = type(target).from_pretrained(sft_args.output_dir)
            first = first if training.four_bit is None else convert_to_4bit(first, training.four_bit)
            measured(name, "sft", first, seconds)
        if "dpo" in training.stages:
            measured(name, "dpo", model, seconds)


def record() -> list[dict[str, str]]:
    path = _record.RESULTS / f"{NAME}.csv"
    return list(csv.DictReader(path.open(newline=""))) if path.exists() else []


def table(rows: list[dict[str, str]]) -> str:
    """A line for each way and stage: each seed's reward, their mean, and the malformed answers."""
    lines = []
    for name, stage in ROWS:
        own = sorted((r for r in rows if (r["training"], r["stage"]) == (name, stage)), key=lambda r: int(r["seed"]))
        if own:
            rewards, malformed = ([float(r[f"{key}_percent"]) for r in own] for key in ("reward", "malformed"))
            cells = [" / ".join(f"{value:.1f}" for value in values) for values in (rewards, malformed)]
            lines.append([name, stage.upper(), cells[0], f"{statistics.mean(rewards):.1f}", cells[1]])
    return markdown(["", "after", "reward, % of the maximum", "mean", "malformed, %"], lines)


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="run nothing, print what is on record")
    options = parser.parse_args(command_line)
    for seed in () if options.table else SEEDS:
        missing = set(ROWS) - {(row["training"], row["stage"]) for row in record() if int(row["seed"]) == seed}
        if missing:
            with tempfile.TemporaryDirectory() as folder:
                run_seed(seed, missing, Path(folder))
    print(table(record()))


if __name__ == "__main__":
    main()
