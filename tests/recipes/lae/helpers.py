"""Tiny backbones, data and runs for the tests of LAE."""

import torch
from peft import LoraConfig
from torch.utils.data import Dataset
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, Trainer, TrainingArguments, ViTConfig, ViTModel

from hf_stablespam.recipes.lae import (
    CalibratedPrefixConfig,
    IncrementalClassifier,
    LAECallback,
    LAEModel,
    ParallelAdapterConfig,
    add_lae_adapters,
)

WIDTH, IMAGE = 16, 8
KEYS_AND_VALUES = ["k_proj", "v_proj", "key", "value"]  # the second pair in transformers 4


def tiny_vit(seed: int = 0, **options: object) -> ViTModel:
    torch.manual_seed(seed)
    config = ViTConfig(
        **{"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        | {"image_size": IMAGE, "patch_size": 4, "num_channels": 1}
        | options
    )
    return ViTModel(config, add_pooling_layer=False)


def tiny_bert() -> BertModel:
    torch.manual_seed(0)
    return BertModel(
        BertConfig(
            vocab_size=40, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=16,
        )
    )  # fmt: skip


def tiny_llama() -> LlamaModel:
    torch.manual_seed(0)
    return LlamaModel(
        LlamaConfig(
            vocab_size=40, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=32, max_position_embeddings=32, pad_token_id=0,
        )
    )  # fmt: skip


def lora(rank: int = 2) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=KEYS_AND_VALUES)


METHODS = {"lora": lora, "adapter": ParallelAdapterConfig, "prefix": CalibratedPrefixConfig}


def vit_model(method: str = "lora", tasks: int = 1, classes: int = 2, seed: int = 0, **options: object) -> LAEModel:
    """An `LAEModel` on a tiny ViT; task t has the labels `classes * t` to `classes * t + classes - 1`."""
    experts = add_lae_adapters(tiny_vit(seed), METHODS[method](), **options)
    model = LAEModel(experts, IncrementalClassifier(WIDTH))
    for _ in range(tasks):
        model.classifier.add_task(classes)
    return model


class Images(Dataset):
    """Random images whose mean says the class, of the classes of one task."""

    def __init__(self, task: int = 0, classes: int = 2, rows: int = 12) -> None:
        generator = torch.Generator().manual_seed(task)
        self.labels = torch.arange(rows) % classes + classes * task
        noise = torch.randn(rows, 1, IMAGE, IMAGE, generator=generator)
        self.images = noise + self.labels.view(-1, 1, 1, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}

    def batch(self) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.images, "labels": self.labels}


def arguments(output_dir: object, **options: object) -> TrainingArguments:
    defaults = {
        **{"per_device_train_batch_size": 4, "num_train_epochs": 2, "learning_rate": 0.01, "max_grad_norm": 0.0},
        **{"lr_scheduler_type": "constant", "weight_decay": 0.0, "report_to": "none", "use_cpu": True},
        **{"disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no", "optim": "adamw_torch"},
    }
    return TrainingArguments(str(output_dir), **{**defaults, **options})


def train_task(
    model: LAEModel,
    output_dir: object,
    task: int = 0,
    callbacks: tuple = (),
    resume: str | None = None,
    data: Dataset | None = None,
    lae: dict | None = None,
    **options: object,
) -> Trainer:
    callback = LAECallback(task, **{"ema_decay": 0.9, **(lae or {})})
    trainer = Trainer(
        model,
        arguments(output_dir, **options),
        train_dataset=Images(task) if data is None else data,
        callbacks=[callback, *callbacks],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer
