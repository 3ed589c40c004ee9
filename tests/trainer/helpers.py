"""A tiny Llama, its data and its Trainer: small enough that twenty steps take less than a second."""

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

VOCABULARY = 64


class RandomTokens(Dataset):
    """Sequences of random tokens, the same at every run."""

    def __init__(self, rows: int = 64, length: int = 16) -> None:
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(VOCABULARY, (rows, length), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def tiny_llama(**overrides) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
    }
    return LlamaForCausalLM(LlamaConfig(**{**shape, **overrides}))


def arguments(output_dir, **overrides) -> TrainingArguments:
    defaults = {
        "optim": "stable_spam",
        "max_grad_norm": 0.0,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return TrainingArguments(output_dir=str(output_dir), **{**defaults, **overrides})


def tiny_trainer(output_dir, *, callbacks=(), trainer_cls=Trainer, model=None, optimizers=(None, None), **overrides):
    return trainer_cls(
        model=tiny_llama() if model is None else model,
        args=arguments(output_dir, **overrides),
        train_dataset=RandomTokens(),
        eval_dataset=RandomTokens(rows=4),
        callbacks=list(callbacks),
        optimizers=optimizers,
    )


def optimizer_of(trainer):
    """The optimizer without accelerate's wrapper."""
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


def training_logs(trainer) -> list[dict]:
    return [row for row in trainer.state.log_history if "loss" in row]
