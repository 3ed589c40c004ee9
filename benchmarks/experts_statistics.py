"""Stable-SPAM over a mixture: AdaClip and AdaGN with one statistic per tensor of all experts, or one per expert.

    python benchmarks/experts_statistics.py              # 18 runs, rows in results/experts_statistics.csv; resumable
    python benchmarks/experts_statistics.py --steps 3 --dry-run

A Qwen3-MoE of 4 layers and 8 experts, W4A4 in groups of 32, reads the standard library's source as bytes, 256 a step.
Per expert the optimizer is given each expert's matrices as parameters of their own (views of the model's). Spikes: from
step 60 on, at every 10th step, the gradient of one expert is a thousand times as large in 4 tensors.
"""

from __future__ import annotations

import argparse
import csv
import sys
from itertools import product
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[1]))

from corpus import is_validation, standard_library_documents

from benchmarks._record import RESULTS, append_rows
from hf_stablespam import FourBitConfig, StableSPAM, convert_to_4bit
from hf_stablespam.quant.layers.experts import is_experts, weight_names

NAME = "experts_statistics"
METHODS, SEEDS = ("per tensor", "per expert", "adamw"), (0, 1, 2)
LEARNING_RATE, WARM_UP = 2e-3, 10
BATCH, LENGTH, EVALUATED = 2, 128, 64  # sequences of a step, bytes of a sequence, sequences held out
SPIKE, FIRST_SPIKE, SPIKE_EVERY, SPIKED_EXPERT = 1000.0, 60, 10, 3


def make_model(seed: int) -> nn.Module:
    """A random mixture in 4 bits."""
    torch.manual_seed(seed)
    shape = {"vocab_size": 256, "hidden_size": 128, "moe_intermediate_size": 128, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32}
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **shape, **heads, **experts))
    return convert_to_4bit(model, FourBitConfig(group_size=32))


def expert_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of all experts, layer by layer."""
    return [getattr(block, name) for block in model.modules() if is_experts(block) for name in weight_names(block)]


class PerExpert:
    """Each expert's matrices as parameters of their own, which share their memory with the model's."""

    def __init__(self, model: nn.Module) -> None:
        self.whole = expert_parameters(model)
        self.views = [[nn.Parameter(one) for one in parameter.detach().unbind(0)] for parameter in self.whole]
        together = set(map(id, self.whole))
        others = [parameter for parameter in model.parameters() if id(parameter) not in together]
        self.parameters = [*others, *(view for views in self.views for view in views)]

    def hand_over_gradients(self) -> None:
        for parameter, views in zip(self.whole, self.views, strict=True):
            for view, gradient in zip(views, parameter.grad.unbind(0), strict=True):
                view.grad = gradient


def read_bytes() -> tuple[torch.Tensor, torch.Tensor]:
    """The text to train on and the text held out, as bytes."""
    kinds: dict[bool, list[bytes]] = {False: [], True: []}
    for name, text in standard_library_documents():
        kinds[is_validation(name)].append(text.encode())
    joined = [b"".join(kinds[held_out]) for held_out in (False, True)]
    return tuple(torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in joined)


def sequences(text: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Random sequences of the text."""
    starts = torch.randint(len(text) - LENGTH, (count,), generator=generator)
    return torch.stack([text[start : start + LENGTH] for start in starts]).long()


def train(method: str, spikes: bool, seed: int, steps: int, texts: tuple[torch.Tensor, torch.Tensor]) -> float:
    """The loss of held-out text after training."""
    model, split = make_model(seed), None
    parameters = list(model.parameters())
    if method == "per expert":
        split = PerExpert(model)
        parameters = split.parameters
    kind = torch.optim.AdamW if method == "adamw" else StableSPAM
    optimizer = kind(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM_UP))
    generator = torch.Generator().manual_seed(seed)
    spiked = expert_parameters(model)[:4]
    for step in range(1, steps + 1):
        batch = sequences(texts[0], BATCH, generator)
        model.zero_grad()
        model(batch, labels=batch).loss.backward()
        if spikes and step >= FIRST_SPIKE and step % SPIKE_EVERY == 0:
            for parameter in spiked:
                parameter.grad[SPIKED_EXPERT] *= SPIKE
        if split is not None:
            split.hand_over_gradients()
        optimizer.step()
        schedule.step()
    held_out = sequences(texts[1], EVALUATED, torch.Generator().manual_seed(0)).split(8)
    with torch.no_grad():
        return sum(model.eval()(batch, labels=batch).loss.item() for batch in held_out) / len(held_out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--dry-run", action="store_true", help="print and do not record")
    options = parser.parse_args()
    path = RESULTS / f"{NAME}.csv"
    rows = list(csv.DictReader(path.open(newline=""))) if path.exists() else []
    done = {(row["statistics"], row["spikes"], row["seed"], row["steps"]) for row in rows}
    texts = read_bytes()
    for spikes, seed, method in product((False, True), SEEDS, METHODS):  # whole comparisons first
        run = {"statistics": method, "spikes": int(spikes), "seed": seed, "steps": options.steps}
        if tuple(map(str, run.values())) in done and not options.dry_run:
            continue
        run["eval_loss"] = round(train(method, spikes, seed, options.steps, texts), 4)
        print(run) if options.dry_run else append_rows(NAME, [run])


if __name__ == "__main__":
    main()
