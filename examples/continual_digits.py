"""Learn ten digits two by two, without seeing earlier ones again: LAE against plain fine-tuning with LoRA.

    python examples/continual_digits.py --output_dir runs/continual                          # embedded digits
    python examples/continual_digits.py --output_dir runs/cifar100 --dataset_name uoft-cs/cifar100 \\
        --model_name_or_path google/vit-base-patch16-224-in21k --classes_per_task 10 --adapted_layers 5 --rank 5 \\
        --num_train_epochs 5 --num_freeze_epochs 3 --learning_rate 0.0028125 --ema_decay 0.9999 --disable_tqdm False

A small ViT is pretrained on turned digits; upright ones it has never seen. Then both methods learn five tasks of two
digits each, with a LoRA adapter on keys and values. Plain fine-tuning knows all classes seen so far and forgets the
earlier ones; LAE has two experts, and the larger probability decides. The accuracies after each task are printed,
written to accuracy.json and drawn in accuracy.png: for all digits seen by then, and for each task by itself.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from continual_data import Task, digit_tasks, hub_tasks
from peft import LoraConfig, PeftConfig
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import (
    AutoModel,
    HfArgumentParser,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from hf_stablespam import FourBitCallback, FourBitConfig
from hf_stablespam.recipes.lae import (
    CalibratedPrefixConfig,
    IncrementalClassifier,
    LAECallback,
    LAEModel,
    ParallelAdapterConfig,
    accuracy_per_task,
    add_lae_adapters,
    incremental_metrics,
    score_dataset,
)

ANSWERS = {"default": "online", "offline": "offline", "ensemble": "ensemble"}


@dataclass
class ScriptArguments:
    model_name_or_path: str | None = field(default=None, metadata={"help": "Default: a small ViT, pretrained here."})
    dataset_name: str | None = field(default=None, metadata={"help": "Hub name or folder; default: embedded digits."})
    label_column: str | None = field(default=None, metadata={"help": "Default: fine_label, or the first class column."})
    classes_per_task: int = field(default=2, metadata={"help": "How many classes each task brings."})
    method: str = field(default="lora", metadata={"help": "lora, adapter or prefix."})
    rank: int = field(default=5, metadata={"help": "Rank of LoRA, width of the adapter."})
    adapted_layers: int | None = field(default=None, metadata={"help": "So many first blocks; default: all."})
    calibrate: bool = field(default=True, metadata={"help": "Learnable scalars on the adapter."})
    ema_decay: float = field(default=0.98, metadata={"help": "Of the offline expert, per step."})
    num_freeze_epochs: int = field(default=3, metadata={"help": "In which only the new head learns."})
    four_bit: str | None = field(default=None, metadata={"help": "Format of the frozen backbone, such as int4."})
    group_size: int = field(default=16, metadata={"help": "Numbers that share a scale, with --four_bit."})
    pretraining_steps: int = field(default=500, metadata={"help": "Of the small ViT."})
    smoke: bool = field(default=False, metadata={"help": "A few steps, to see that it runs."})


def pretrained_vit(data: Any, steps: int, folder: Path, seed: int) -> nn.Module:
    """A small ViT that tells 30 classes apart: digits turned by 90, 180 and 270 degrees."""
    set_seed(seed)
    model = ViTForImageClassification(
        ViTConfig(
            **{"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 192},
            **{"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 30},
        )
    )
    args = TrainingArguments(
        str(folder / "pretraining"), max_steps=max(1, steps), per_device_train_batch_size=64, learning_rate=2e-3,
        warmup_steps=steps // 4, lr_scheduler_type="cosine", optim="adamw_torch", seed=seed, save_strategy="no",
        logging_strategy="no", report_to="none", dataloader_pin_memory=False,
    )  # fmt: skip
    if steps:
        Trainer(model, args, train_dataset=data).train()
    return model.cpu()


def pet_config(script: ScriptArguments) -> PeftConfig:
    """The PEFT method, in the first `adapted_layers` blocks."""
    layers = list(range(script.adapted_layers)) if script.adapted_layers else None
    where: dict[str, Any] = {"layers_to_transform": layers, "layers_pattern": ["layers", "layer"] if layers else None}
    if script.method == "adapter":
        return ParallelAdapterConfig(down_sample=script.rank, **where)
    if script.method == "prefix":
        return CalibratedPrefixConfig(**where)
    if script.method != "lora":
        raise SystemExit(f"--method must be lora, adapter or prefix, got {script.method}")
    targets = ["k_proj", "v_proj", "key", "value"]  # the second pair in transformers 4
    return LoraConfig(r=script.rank, lora_alpha=script.rank, target_modules=targets, **where)


def learn(
    backbone: nn.Module, tasks: list[Task], args: TrainingArguments, script: ScriptArguments, *, naive: bool
) -> dict[str, list[list[float]]]:
    """All tasks, one after the other; accuracies on the test images of each task so far, after each task.

    Args:
        backbone: a pretrained model; a copy of it is used.
        tasks: classes and images.
        args: of each task's Trainer.
        script: method and options of LAE.
        naive: plain fine-tuning: one adapter, the softmax over all classes seen so far, nothing frozen.

    Returns:
        A matrix for each answer: of "online", "offline" and "ensemble", or of "naive".
    """
    set_seed(args.seed)
    experts = add_lae_adapters(copy.deepcopy(backbone), pet_config(script), calibrate=script.calibrate and not naive)
    width = backbone.config.hidden_size
    model = LAEModel(experts, IncrementalClassifier(width), local_loss=not naive)
    matrices: dict[str, list[list[float]]] = {}
    bar = tqdm(tasks, desc="naive" if naive else "LAE", unit="task")
    for number, task in enumerate(bar):
        model.classifier.add_task(len(task.labels), task.labels)
        callbacks: list[TrainerCallback] = []
        if not naive:
            callbacks.append(LAECallback(number, script.ema_decay, script.num_freeze_epochs))
        if script.four_bit:
            four_bit = FourBitConfig(script.four_bit, script.four_bit, group_size=script.group_size)
            callbacks.append(FourBitCallback(four_bit))
        trainer = Trainer(model, args, train_dataset=task.train, callbacks=callbacks)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        answers = accuracies(model, tasks[: number + 1], args.per_device_eval_batch_size)
        for name, row in answers.items():
            matrices.setdefault("naive" if naive else name, []).append(row)
            if naive:
                break
        best = matrices["naive" if naive else "ensemble"][-1]
        bar.set_postfix(accuracy=f"{100 * sum(best) / len(best):.1f} %")
    return matrices


def accuracies(model: LAEModel, tasks: list[Task], batch_size: int) -> dict[str, list[float]]:
    """For each answer the accuracy on the test images of each task, among all classes so far."""
    test = torch.utils.data.ConcatDataset([task.test for task in tasks])
    experts = list(model.peft_model.peft_config)  # before the second task there is only one
    scores, columns = score_dataset(model, DataLoader(test, batch_size=batch_size), experts)
    scores.setdefault("offline", scores["default"])
    per_task = [len(task.labels) for task in tasks]
    return {name: accuracy_per_task(scores[key], columns, per_task) for key, name in ANSWERS.items()}


def draw(matrices: dict[str, list[list[float]]], sizes: list[int], names: list[str], file: Path) -> None:
    """Curves over the tasks of all answers, and the accuracies task by task of the first and the last of them."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, *maps) = plt.subplots(1, 3, figsize=(15, 4.4), layout="constrained")
    seen = range(1, len(sizes) + 1)
    for name, matrix in matrices.items():
        curve = [100 * incremental_metrics(matrix[:n], sizes[:n]).last for n in seen]
        line = left.plot(seen, curve, marker="o", label=f"{name}: {curve[-1]:.1f} %")
        line[0].set_linestyle("--" if name == "naive" else "-")
    left.set(xlabel="tasks learned", ylabel="accuracy on all classes seen, %", ylim=(0, 105), xticks=list(seen))
    left.grid(alpha=0.3)
    left.legend(loc="lower left")
    for axes, name in zip(maps, (next(iter(matrices)), list(matrices)[-1]), strict=True):
        table = [[100 * value for value in row] + [float("nan")] * (len(sizes) - len(row)) for row in matrices[name]]
        image = axes.imshow(table, vmin=0, vmax=100, cmap="viridis")
        for i, row in enumerate(table):
            for j, value in enumerate(row[: i + 1]):
                axes.text(j, i, f"{value:.0f}", ha="center", va="center", color="white" if value < 60 else "black")
        axes.set(title=f"{name}: accuracy, %", xlabel="on the test images of", ylabel="after learning")
        axes.set_xticks(range(len(sizes)), names, rotation=45 if max(map(len, names)) > 4 else 0)
        axes.set_yticks(range(len(sizes)), names)
    figure.colorbar(image, ax=maps, shrink=0.9)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main(command_line: list[str] | None = None) -> None:
    parser = HfArgumentParser((ScriptArguments, TrainingArguments))
    parser.set_defaults(
        output_dir="runs/continual", num_train_epochs=6, per_device_train_batch_size=24, learning_rate=2e-3,
        per_device_eval_batch_size=256, lr_scheduler_type="constant", optim="stable_spam", max_grad_norm=0.0,
        disable_tqdm=True, save_strategy="no", report_to="none", dataloader_pin_memory=False, logging_strategy="no",
    )  # fmt: skip
    script, args = parser.parse_args_into_dataclasses(command_line)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if script.smoke:
        script.pretraining_steps, args.num_train_epochs, script.num_freeze_epochs = 4, 2, 1
        args.per_device_train_batch_size = 140
    if bool(script.dataset_name) != bool(script.model_name_or_path):
        raise SystemExit("give both --dataset_name and --model_name_or_path, or neither for the embedded digits")

    if script.dataset_name:
        backbone = AutoModel.from_pretrained(script.model_name_or_path)
        size = backbone.config.image_size
        tasks = hub_tasks(script.dataset_name, script.label_column, script.classes_per_task, size, args.seed)
    else:
        pretraining, tasks = digit_tasks(args.seed, script.classes_per_task)
        backbone = pretrained_vit(pretraining, script.pretraining_steps, folder, args.seed).vit

    matrices = {
        **learn(backbone, tasks, args, script, naive=True),
        **learn(backbone, tasks, args, script, naive=False),
    }
    sizes = [len(task.test) for task in tasks]
    print(f"{'':10}{'last':>8}{'average':>9}{'forgetting':>12}   (accuracy on all classes, %)")
    for name, matrix in matrices.items():
        last, average, forgetting = (100 * value for value in incremental_metrics(matrix, sizes))
        print(f"{name:10}{last:8.1f}{average:9.1f}{forgetting:12.1f}")
    names = [", ".join(map(str, t.labels)) if len(t.labels) < 4 else str(i) for i, t in enumerate(tasks)]
    draw(matrices, sizes, names, folder / "accuracy.png")
    (folder / "accuracy.json").write_text(json.dumps({"classes": names, "accuracy": matrices}, indent=2) + "\n")
    print(f"Written: {folder / 'accuracy.png'} and {folder / 'accuracy.json'}")


if __name__ == "__main__":
    main()
