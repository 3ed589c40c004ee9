"""What gradient faults do to a training run, under AdamW, AdamW with clipping, SPAM and Stable-SPAM.

    python benchmarks/faults.py               # every run that results/faults.csv does not have yet, then the table
    python benchmarks/faults.py --table       # the table and the verdict from what is there
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
from collections.abc import Callable, Iterator
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from corpus import Corpus, TokenBlocks, evenly_spaced, load_standard_library
from pretrain import llama

from benchmarks._record import RESULTS, append_rows
from hf_stablespam import SPAM, FourBitConfig, StableSPAM, convert_to_4bit

STEPS, LONG, SEEDS, RATES = 100, 500, (0, 1, 2), (0.05, 0.2, 0.01)
VOCABULARY, BLOCK, BATCH, VALIDATION = 2048, 64, 8, 64
LEARNING_RATE, WARM_UP = 3e-3, 0.1  # of the steps, as in the demo
CLEAN, SPIKES = "none", ("entry x 1e4", "tensor x 1e3")
Parameters = list[torch.nn.Parameter]


@dataclass(frozen=True)
class Run:
    """One line of the results."""

    optimizer: str
    fault: str
    rate: float
    seed: int
    steps: int = STEPS

    @property
    def key(self) -> tuple[str, ...]:
        return tuple(str(value) for value in astuple(self))


def adamw(params: Parameters, steps: int) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, LEARNING_RATE, weight_decay=0)


def spam(params: Parameters, steps: int) -> torch.optim.Optimizer:
    return SPAM(params, LEARNING_RATE, reset_interval=reset_interval(steps), warmup_steps=warm_up(steps))


def stable_spam(params: Parameters, steps: int) -> torch.optim.Optimizer:
    return StableSPAM(params, LEARNING_RATE, reset_interval=reset_interval(steps), decay_steps=steps)


def warm_up(steps: int) -> int:
    return max(1, round(WARM_UP * steps))


def reset_interval(steps: int) -> int:
    """Two resets fall into a run of any length."""
    return max(1, round(0.4 * steps))


OPTIMIZERS: dict[str, Callable[[Parameters, int], torch.optim.Optimizer]] = {
    "AdamW": adamw,
    "AdamW + clipping": adamw,
    "SPAM": spam,
    "Stable-SPAM": stable_spam,
}


def largest_entry(grads: list[Tensor], hit: Tensor, generator: torch.Generator) -> None:
    hit.view(-1)[hit.abs().argmax()] *= 1e4


def whole_tensor(grads: list[Tensor], hit: Tensor, generator: torch.Generator) -> None:
    hit *= 1e3


def nan_entry(grads: list[Tensor], hit: Tensor, generator: torch.Generator) -> None:
    hit.view(-1)[torch.randint(hit.numel(), (), generator=generator)] = torch.nan


def inf_entry(grads: list[Tensor], hit: Tensor, generator: torch.Generator) -> None:
    hit.view(-1)[torch.randint(hit.numel(), (), generator=generator)] = torch.inf


def zeros(grads: list[Tensor], hit: Tensor, generator: torch.Generator) -> None:
    for grad in grads:
        grad.zero_()


FAULTS: dict[str, Callable[[list[Tensor], Tensor, torch.Generator], None]] = {
    "entry x 1e4": largest_entry,
    "tensor x 1e3": whole_tensor,
    "nan": nan_entry,
    "inf": inf_entry,
    "zeros": zeros,
}


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
    optimizer = OPTIMIZERS[run.optimizer](params, steps)
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
        if run.optimizer == "AdamW + clipping":
            torch.nn.utils.clip_grad_norm_(params, 1.0)
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


def table(rows: list[dict[str, str]]) -> str:
    """Markdown: final loss, mean of the seeds; where not all survived, how many did."""
    cells: dict[tuple[str, str, str], list[dict[str, str]]] = {}
    for row in of_length(rows, STEPS):
        cells.setdefault((row["fault"], row["rate"], row["optimizer"]), []).append(row)
    lines = [f"| fault | steps | {' | '.join(OPTIMIZERS)} |", f"|---|---|{'---|' * len(OPTIMIZERS)}"]
    for fault, rate in [(CLEAN, 0.0)] + [(fault, rate) for fault in FAULTS for rate in sorted(RATES)]:
        texts = [_cell(cells.get((fault, str(rate), optimizer), [])) for optimizer in OPTIMIZERS]
        lines.append(f"| {fault} | {rate:.0%} | {' | '.join(texts)} |")
    return "\n".join(lines)


def verdict(rows: list[dict[str, str]]) -> str:
    """The bound: Stable-SPAM survives every run, and with 5 % spikes ends within 1 % of its own clean loss."""
    own = [row for row in rows if row["optimizer"] == "Stable-SPAM"]
    survived = sum(row["survived"] == "True" for row in own)
    above = [value for fault in SPIKES for value in excess(rows, fault).values()]
    worst = f"at most {max(above):+.2%} of its clean loss" if above else "not yet run"
    spiked = f"with 5% spikes over {LONG} steps, {len(above)} runs: {worst}"
    return f"Stable-SPAM survived {survived} of {len(own)} runs; {spiked}"


def excess(rows: list[dict[str, str]], fault: str) -> dict[str, float]:
    """By seed, how far above its own clean loss a long run of Stable-SPAM ended, as a share of it."""
    own = [row for row in of_length(rows, LONG) if row["optimizer"] == "Stable-SPAM"]
    clean = {row["seed"]: float(row["final_loss"]) for row in own if row["fault"] == CLEAN}
    return {
        row["seed"]: float(row["final_loss"]) / clean[row["seed"]] - 1
        for row in own
        if row["fault"] == fault and row["seed"] in clean
    }


def bound_table(rows: list[dict[str, str]]) -> str:
    """Markdown: the long runs of Stable-SPAM, each seed's excess over its own clean loss."""
    own = [row for row in of_length(rows, LONG) if row["optimizer"] == "Stable-SPAM"]
    clean = {row["seed"]: row["final_loss"] for row in own if row["fault"] == CLEAN}
    lines = [f"| 5 % of {LONG} steps | {' | '.join(f'seed {seed}' for seed in clean)} |", f"|---|{'---|' * len(clean)}"]
    lines.append(f"| {CLEAN}: the loss | {' | '.join(clean.values())} |")
    for fault in FAULTS:
        above = excess(rows, fault)
        lines.append(f"| {fault} | {' | '.join(f'{above[seed]:+.2%}' if seed in above else '–' for seed in clean)} |")
    return "\n".join(lines)


def of_length(rows: list[dict[str, str]], steps: int) -> list[dict[str, str]]:
    return [row for row in rows if row["steps"] == str(steps)]


def _cell(rows: list[dict[str, str]]) -> str:
    if not rows:
        return "–"
    alive = [row for row in rows if row["survived"] == "True"]
    nan_steps = round(mean(int(row["nan_steps"]) for row in rows))
    if not alive:
        return f"lost ({nan_steps} nan steps)"
    loss = f"{mean(float(row['final_loss']) for row in alive):.3f}"
    return loss if len(alive) == len(rows) else f"{loss}, {len(alive)} of {len(rows)} ({nan_steps} nan steps)"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the table and train nothing")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of each run; default {STEPS}")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help=f"default {SEEDS}")
    parser.add_argument("--dry-run", action="store_true", help="print rows instead of appending them")
    options = parser.parse_args(arguments)
    path = RESULTS / "faults.csv"
    if not options.table:
        corpus = load_standard_library(VOCABULARY)
        finished = [] if options.dry_run else read(path)
        done = {tuple(row[field.name] for field in fields(Run)) for row in finished}
        for run in all_runs(tuple(options.seeds), options.steps):
            if run.key in done:
                continue
            row = asdict(run) | train(run, corpus)
            print(*row.values(), flush=True)
            if not options.dry_run:
                append_rows("faults", [row])
    rows = read(path)
    print(f"{table(rows)}\n\n{bound_table(rows)}\n\n{verdict(rows)}")


if __name__ == "__main__":
    main()
