"""What gradient faults do to a training run, under AdamW, AdamW with clipping, SPAM and Stable-SPAM.

    python benchmarks/faults.py               # every run that results/faults.csv does not have yet, then the table
    python benchmarks/faults.py --table       # the table and the verdict from what is there
    python benchmarks/faults.py --parts       # other runs: each part left out, AdaGC, ZClip, rates too high
    python benchmarks/faults.py --steps 20 --seeds 0 --dry-run

The demo's pretraining in 4 bits (the same Llama of 1.3 million parameters, INT4 weights and activations, the same
text) in smaller batches, so that all runs fit into an hour and a half of one core. Stable-SPAM without faults and
with each in 5 % of the steps runs a second time, at the demo's length of 500 steps: the bound is read from those. In
a share of the steps, drawn by the seed, the gradient is damaged before the optimizer sees it: the largest entry of
one tensor times 1e4; one tensor times 1e3; one entry `nan`; one entry `inf`; everything zero. Which steps and which
tensors are the same for all optimizers. A run survives if its weights stay finite and its validation loss ends below
where it began. Rows are appended one by one: what is interrupted goes on where it stopped.
"""

import argparse
import csv
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from corpus import Corpus, TokenBlocks, evenly_spaced, load_standard_library
from pretrain import llama

from benchmarks import _record
from benchmarks._record import RESULTS, append_rows
from benchmarks.fault_methods import (
    BUILD,
    CLEAN,
    CLIPPING,
    FAULTS,
    INSTEAD,
    LEARNING_RATE,
    LONG,
    OPTIMIZERS,
    PARTS,
    RATES,
    SPIKES,
    STEPS,
    warm_up,
)
from benchmarks.fault_tables import bound_table, parts_table, table, verdict
from hf_stablespam import FourBitConfig, convert_to_4bit

SEEDS = (0, 1, 2)
VOCABULARY, BLOCK, BATCH, VALIDATION = 2048, 64, 8, 64


@dataclass(frozen=True)
class Run:
    """One line of the results."""

    optimizer: str
    fault: str
    rate: float
    seed: int
    steps: int = STEPS
    times: int = 1  # the learning rate

    @property
    def key(self) -> tuple[str, ...]:
        return tuple(str(value) for value in astuple(self))


def key_of(row: dict[str, str]) -> tuple[str, ...]:
    """The run of a row; the first ones on record do not say that the learning rate is once that of all."""
    return tuple(row.get(field.name) or "1" for field in fields(Run))


def all_runs(seeds: tuple[int, ...], steps: int = STEPS) -> Iterator[Run]:
    """The long runs of the bound, then seed by seed, each optimizer in turn; the 5 % come before the other rates."""
    if steps == STEPS:
        for seed in seeds:
            yield Run("Stable-SPAM", CLEAN, 0.0, seed, LONG)
            yield from (Run("Stable-SPAM", fault, 0.05, seed, LONG) for fault in FAULTS)
    for seed in seeds:
        for fault, rate in [(CLEAN, 0.0)] + [(fault, rate) for rate in RATES for fault in FAULTS]:
            for optimizer in OPTIMIZERS:
                yield Run(optimizer, fault, rate, seed, steps)


def part_runs(seeds: tuple[int, ...], steps: int = STEPS) -> Iterator[Run]:
    """Each part of Stable-SPAM left out, and what one would take instead, under spikes and at rates too high."""
    for seed in seeds:
        for optimizer in ("Stable-SPAM", *PARTS, *INSTEAD, "AdamW + clipping"):
            yield Run(optimizer, CLEAN, 0.0, seed, steps)
            yield from (Run(optimizer, fault, rate, seed, steps) for rate in (0.05, 0.01) for fault in SPIKES)
            yield from (Run(optimizer, CLEAN, 0.0, seed, steps, times) for times in (2, 4))


def demo_llama(tokenizer: PreTrainedTokenizerBase, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return convert_to_4bit(llama("tiny", tokenizer, BLOCK), FourBitConfig(weight="int4", activation="int4"))


def schedule(step: int, steps: int) -> float:
    """Warm-up, then a cosine to a tenth, as in the demo."""
    rising = warm_up(steps)
    if step < rising:
        return (step + 1) / rising
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def train(run: Run, corpus: Corpus) -> dict[str, object]:
    """One run, and what became of it."""
    steps = run.steps
    data = TokenBlocks(corpus.train, BLOCK)
    held_out = evenly_spaced(TokenBlocks(corpus.validation, BLOCK), VALIDATION)
    model = demo_llama(corpus.tokenizer, run.seed)
    params = list(model.parameters())
    optimizer = BUILD[run.optimizer](params, run.times * LEARNING_RATE, steps)
    clip = CLIPPING[run.optimizer](steps) if run.optimizer in CLIPPING else None
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, steps))
    randomness = torch.Generator().manual_seed(run.seed)
    order = torch.randperm(len(data), generator=randomness)[: steps * BATCH].view(steps, BATCH).tolist()
    faulty = set(torch.randperm(steps, generator=randomness)[: round(run.rate * steps)].tolist())
    first_loss, nan_steps = validation_loss(model, held_out), 0
    for step, rows in enumerate(order):
        loss = model(**batch([data[row] for row in rows])).loss
        loss.backward()
        hit = params[int(torch.randint(len(params), (), generator=randomness))].grad
        if step in faulty:
            FAULTS[run.fault]([param.grad for param in params], hit, randomness)
        if clip is not None:
            clip(params)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        nan_steps += not math.isfinite(loss.item())
        if not all(param.isfinite().all() for param in params):
            nan_steps += steps - step - 1  # nothing brings such weights back
            break
    last_loss = validation_loss(model, held_out)
    return {
        "final_loss": round(last_loss, 4),
        "nan_steps": nan_steps,
        "survived": math.isfinite(last_loss) and last_loss < first_loss,
    }


def batch(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}


@torch.no_grad()
def validation_loss(model: LlamaForCausalLM, held_out: torch.utils.data.Dataset) -> float:
    model.eval()
    loss = model(**batch([held_out[index] for index in range(len(held_out))])).loss.item()
    model.train()
    return loss


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the table and train nothing")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of each run; default {STEPS}")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help=f"default {SEEDS}")
    parser.add_argument("--parts", action="store_true", help="each part left out, AdaGC and ZClip: other runs")
    parser.add_argument("--results", type=Path, help="folder of the CSV file; default: the committed one")
    parser.add_argument("--dry-run", action="store_true", help="print rows instead of appending them")
    options = parser.parse_args(arguments)
    _record.RESULTS = options.results or RESULTS
    path = _record.RESULTS / "faults.csv"
    if not options.table:
        corpus = load_standard_library(VOCABULARY)
        finished = [] if options.dry_run else read(path)
        done = {key_of(row) for row in finished}
        asked = part_runs if options.parts else all_runs
        for run in asked(tuple(options.seeds), options.steps):
            if run.key in done:
                continue
            row = asdict(run) | train(run, corpus)
            print(*row.values(), flush=True)
            if not options.dry_run:
                append_rows("faults", [row])
    rows = read(path)
    if options.parts:
        print(parts_table(rows))
        return
    print(f"{table(rows)}\n\n{bound_table(rows)}\n\n{verdict(rows)}")


if __name__ == "__main__":
    main()
