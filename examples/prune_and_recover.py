"""A smaller language model out of a larger one: prune to half of the parameters, train a little, and compare.

    python examples/prune_and_recover.py                # on the standard library's bytes: 3 minutes on 2 cores
    python examples/prune_and_recover.py --model_name_or_path HuggingFaceTB/SmolLM2-135M \
        --dataset_name allenai/c4 --dataset_config_name en --target 0.8 --recovery_steps 2000 --learning_rate 2e-5

Cuts the model twice, every layer alike and each layer by its own measure, and trains both equally long; without a
model's name a small one is pretrained first, and one of the small shape is trained from scratch as long.
Prints losses, draws `prune_and_recover.png` (widths by layer, loss over parameters), and saves the adaptive model in a
folder for `load_pruned`. `--four_bit` cuts and recovers in INT4. `--stages 5` cuts and trains alternately instead.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from corpus import SMALLEST_VOCABULARY, TokenBlocks, evenly_spaced, load_standard_library
from matplotlib.ticker import MaxNLocator
from text_data import load_text_data
from torch.utils.data import DataLoader, Dataset, RandomSampler
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from hf_stablespam import FourBitConfig, convert_to_4bit
from hf_stablespam.recipes.adapt_pruner import (
    PruningPlan,
    adapt_prune,
    prune_and_train,
    prune_units,
    save_pruned,
)

METHODS = ("uniform", "adaptive")
COLORS = {"dense": "#6b7280", "uniform": "#d97706", "adaptive": "#2563eb", "from scratch": "#059669"}


def parse(command_line: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model_name_or_path", help="a model of the hub or a folder; default: pretrain a small Llama")
    parser.add_argument("--dataset_name", help="hub name, folder or file; default: Python's standard library, as bytes")
    parser.add_argument("--dataset_config_name")
    parser.add_argument("--target", type=float, default=0.5, help="share of the parameters that is left")
    parser.add_argument("--stages", type=int, default=1, help="cuts, with a part of the recovery after each")
    parser.add_argument("--amplitude", type=float, default=0.02, help="of the adaptive cut; the uniform one has 0")
    parser.add_argument("--pretraining_steps", type=int, default=500)
    parser.add_argument("--recovery_steps", type=int, default=150)
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="of the recovery")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--block_size", type=int, default=64)
    parser.add_argument("--calibration_sequences", type=int, default=64, help="drawn anew in each step of the pruning")
    parser.add_argument("--hidden_size", type=int, default=64)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--four_bit", action="store_true", help="INT4 weights in groups of 16, from the cut on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", default="runs/prune_and_recover")
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args(command_line)
    if options.smoke:
        options.pretraining_steps, options.recovery_steps, options.calibration_sequences = 6, 4, 8
        options.hidden_size, options.layers, options.block_size = 16, 3, 16
    return options


def load_data(options: argparse.Namespace) -> tuple[Dataset, Dataset]:
    """Blocks to train on, and 256 to validate with."""
    if options.dataset_name is None:
        corpus = load_standard_library(SMALLEST_VOCABULARY)
        train, validation = (TokenBlocks(part, options.block_size) for part in (corpus.train, corpus.validation))
    else:
        train, validation, _ = load_text_data(
            options.dataset_name,
            options.dataset_config_name,
            tokenizer_name=options.model_name_or_path,
            vocab_size=SMALLEST_VOCABULARY,
            block_size=options.block_size,
            seed=options.seed,
        )
    return train, evenly_spaced(validation, 16 if options.smoke else 256)


def new_model(options: argparse.Namespace) -> LlamaForCausalLM:
    """A small Llama over bytes, in which pairs of heads share keys and values."""
    config = LlamaConfig(
        vocab_size=SMALLEST_VOCABULARY,
        hidden_size=options.hidden_size,
        intermediate_size=3 * options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def make_trainer(
    model: torch.nn.Module, data: tuple[Dataset, Dataset], steps: int, learning_rate: float, options: argparse.Namespace
) -> Trainer:
    """Stable-SPAM under a schedule that is constant and then falls."""
    arguments = TrainingArguments(
        options.output_dir,
        max_steps=steps or -1,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=64,
        learning_rate=learning_rate,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": max(1, steps // 5), "min_lr_ratio": 0.1},
        warmup_steps=max(1, steps // 20),
        optim="stable_spam",
        max_grad_norm=0,
        seed=options.seed,
        save_strategy="no",
        logging_steps=max(1, steps // 5),
        report_to="none",
        dataloader_pin_memory=False,
    )
    train, validation = data
    return Trainer(model, arguments, train_dataset=train, eval_dataset=validation, data_collator=default_data_collator)


def trained(
    model: torch.nn.Module, data: tuple[Dataset, Dataset], steps: int, learning_rate: float, options: argparse.Namespace
) -> float:
    """Trains the model, if there are steps, and returns its validation loss."""
    trainer = make_trainer(model, data, steps, learning_rate, options)
    if steps:
        trainer.train()
    return trainer.evaluate()["eval_loss"]


def calibration(train: Dataset, options: argparse.Namespace) -> DataLoader:
    """Other samples in each step of the pruning."""
    sampler = RandomSampler(train, num_samples=min(options.calibration_sequences, len(train)))
    return DataLoader(train, batch_size=16, sampler=sampler, collate_fn=default_data_collator)


def cut_and_recovered(
    dense: torch.nn.Module, method: str, data: tuple[Dataset, Dataset], options: argparse.Namespace
) -> tuple[torch.nn.Module, dict]:
    """A pruned copy of the model after its recovery, and its figures."""
    model = copy.deepcopy(dense)
    if options.four_bit:
        convert_to_4bit(model, FourBitConfig(weight="int4", activation="int4", group_size=16))
    figures: dict = {}

    def note(trainer: Trainer, stage: int, report) -> None:
        figures["parameters"] = report.parameters_after
        figures["widths"] = [one["intermediate_size"] for one in report.widths]
        figures["kv_heads"] = [one["kv_heads"] for one in report.widths]

    settings = {"amplitude": options.amplitude if method == "adaptive" else 0.0, "seed": options.seed}
    batches = calibration(data[0], options)
    if options.stages == 1:
        note(None, 0, adapt_prune(model, options.target, batches, **settings))
        figures["cut"] = trained(model, data, 0, 1e-3, options)
        figures["recovered"] = trained(model, data, options.recovery_steps, options.learning_rate, options)
    else:
        steps, rate = options.recovery_steps, options.learning_rate
        make = lambda model, stage: make_trainer(model, data, steps, rate, options)  # noqa: E731
        prune_and_train(
            model, make, options.target, stages=options.stages, calibration=batches, on_stage_end=note, **settings
        )
        figures["recovered"] = trained(model, data, 0, rate, options)
    return model, figures


def from_scratch(figures: dict, data: tuple[Dataset, Dataset], options: argparse.Namespace) -> dict:
    """A new model of the small shape, trained as long as the recovery took."""
    set_seed(options.seed + 1)
    model = new_model(options)
    widths = zip(figures["widths"], figures["kv_heads"], strict=True)
    prune_units(
        model, PruningPlan([{"neurons": range(neurons), "kv_heads": range(heads)} for neurons, heads in widths])
    )
    loss = trained(model, data, options.recovery_steps, 3e-3, options)
    return {"parameters": figures["parameters"], "recovered": loss}


def compare(options: argparse.Namespace) -> dict[str, dict]:
    """The figures of every method, by its name; the adaptive model is saved."""
    set_seed(options.seed)
    data = load_data(options)
    if options.model_name_or_path:
        dense = AutoModelForCausalLM.from_pretrained(options.model_name_or_path)
        loss = trained(dense, data, 0, 1e-3, options)
    else:
        dense = new_model(options)
        loss = trained(dense, data, options.pretraining_steps, 3e-3, options)
    results = {"dense": {"parameters": sum(p.numel() for p in dense.parameters()), "recovered": loss}}
    results["dense"]["widths"] = [layer.mlp.down_proj.in_features for layer in dense.model.layers]
    for method in METHODS:
        model, results[method] = cut_and_recovered(dense, method, data, options)
    save_pruned(model, Path(options.output_dir) / "adaptive")
    if not options.model_name_or_path:
        results["from scratch"] = from_scratch(results["adaptive"], data, options)
    return results


def draw(results: dict[str, dict], path: Path) -> None:
    """Widths by layer, and loss over parameters before and after the recovery."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    shown = [name for name in ("dense", *METHODS) if name in results]
    for place, name in enumerate(shown):
        widths = results[name]["widths"]
        left.bar(
            [layer + (place - 1) * 0.28 for layer in range(len(widths))], widths, 0.26, color=COLORS[name], label=name
        )
    left.set(xlabel="layer", ylabel="neurons of the MLP", title="What is left of each layer")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.legend(loc="upper center", ncols=3, frameon=False, bbox_to_anchor=(0.5, -0.16))
    beside = {"uniform": -0.02, "adaptive": 0.02}  # of the same size: drawn beside each other
    for name, row in results.items():
        x = row["parameters"] * (1 + beside.get(name, 0))
        right.scatter(x, row["recovered"], color=COLORS[name], s=60, zorder=3, label=name)
        if "cut" in row:
            right.scatter(x, row["cut"], facecolors="none", edgecolors=COLORS[name], s=60, zorder=3)
            right.plot([x, x], [row["cut"], row["recovered"]], color=COLORS[name], lw=1)
    right.scatter([], [], facecolors="none", edgecolors="#374151", s=60, label="before the recovery")
    right.set(xlabel="parameters", ylabel="validation loss", title="Loss over parameters")
    right.legend(frameon=False, fontsize=9)
    right.margins(x=0.25, y=0.12)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(command_line: list[str] | None = None) -> None:
    options = parse(command_line)
    results = compare(options)
    path = Path(options.output_dir) / "prune_and_recover.png"
    draw(results, path)
    print(f"\n{'':<14}{'parameters':>11}{'after the cut':>15}{'trained':>9}  neurons by layer")
    for name, row in results.items():
        cut = f"{row['cut']:.3f}" if "cut" in row else ""
        widths = " ".join(map(str, row.get("widths", [])))
        print(f"{name:<14}{row['parameters']:>11,}{cut:>15}{row['recovered']:>9.3f}  {widths}")
    print(f"\npicture: {path}\nmodel:   load_pruned({str(path.parent / 'adaptive')!r})")


if __name__ == "__main__":
    main()
