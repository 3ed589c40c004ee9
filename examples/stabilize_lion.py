"""Stable-SPAM's clipping and normalising in front of another optimizer: Lion, in 4 bits, with and without.

    python examples/stabilize_lion.py
    python examples/stabilize_lion.py --steps 1000 --learning_rate 3e-4 --dataset_name path/to/text.jsonl

Two pretrainings of a tiny Llama in INT4 with the same data, seed, steps and learning rate. `StabilizeCallback` is
the one difference; it works with any optimizer that the Trainer runs, and `stabilize(optimizer)` in your own loop.
Prints both validation losses, whichever is lower.
"""

from __future__ import annotations

import argparse

import torch
from pretrain import DataArguments, ModelArguments, llama, load_data
from transformers import Trainer, TrainingArguments, default_data_collator, set_seed

from hf_stablespam import FourBitCallback, FourBitConfig, StabilizeCallback

BLOCK_SIZE = 128


class Lion(torch.optim.Optimizer):
    """Evolved sign momentum (arXiv 2302.06675): the sign of an interpolation of momentum and gradient."""

    def __init__(self, params, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for param in group["params"]:
                if param.grad is not None:
                    momentum = self.state[param].setdefault("exp_avg", torch.zeros_like(param))
                    param.mul_(1 - lr * group["weight_decay"])
                    param.sub_(lr * torch.lerp(param.grad, momentum, beta1).sign())
                    momentum.lerp_(param.grad, 1 - beta2)
        return loss


def pretrain(options: argparse.Namespace, stabilized: bool) -> float:
    """Trains the model from its seed and returns the validation loss."""
    arguments = TrainingArguments(
        options.output_dir,
        max_steps=options.steps,
        per_device_train_batch_size=16,
        lr_scheduler_type="cosine",
        warmup_steps=options.steps // 10,
        max_grad_norm=0 if stabilized else 1,
        seed=options.seed,
        save_strategy="no",
        logging_steps=max(1, options.steps // 10),
        report_to="none",
    )
    set_seed(options.seed)
    blocks = 16 if options.smoke else 512
    data = DataArguments(dataset_name=options.dataset_name, block_size=BLOCK_SIZE, max_eval_samples=blocks)
    train, validation, tokenizer = load_data(data, ModelArguments(), options.seed)
    model = llama("tiny", tokenizer, BLOCK_SIZE)
    callbacks = [FourBitCallback(FourBitConfig(weight="int4", activation="int4"))]
    if stabilized:
        callbacks.append(StabilizeCallback())
    trainer = Trainer(
        model,
        arguments,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=default_data_collator,
        callbacks=callbacks,
        optimizers=(Lion(model.parameters(), lr=options.learning_rate), None),
    )
    trainer.train()
    return trainer.evaluate()["eval_loss"]


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200, help="update steps of each run")
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--dataset_name", help="hub name, folder or file; default: Python's standard library")
    parser.add_argument("--output_dir", default="runs/stabilize_lion")
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args(command_line)
    if options.smoke:
        options.steps = 4
    losses = {name: pretrain(options, name != "Lion + clipping") for name in ("Lion + clipping", "Lion + stabilize")}
    print(f"\nvalidation loss after {options.steps} steps in INT4")
    for name, loss in losses.items():
        print(f"  {name:<18} {loss:.3f}")


if __name__ == "__main__":
    main()
