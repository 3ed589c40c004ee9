"""GaLore + Stable-SPAM in 4 bits: pretraining with a fraction of the optimizer's memory, by Trainer arguments alone.

    python examples/galore_pretrain.py
    python examples/galore_pretrain.py --rank 16 --state_bits 8        # 8-bit moments as well: pip install '.[lowbit]'
    python examples/galore_pretrain.py --layerwise                     # updates during the backward pass
    python examples/galore_pretrain.py --steps 2000 --dataset_name path/to/text.jsonl

The gradients of the attention and MLP weights are projected to `--rank` directions; AdaClip, AdaGN and Adam work there,
and the update is projected back. Prints the validation loss, and what the optimizer holds against what AdamW would.
"""

from __future__ import annotations

import argparse

from pretrain import DataArguments, ModelArguments, llama, load_data
from transformers import Trainer, TrainingArguments, default_data_collator, set_seed

from hf_stablespam import FourBitCallback, FourBitConfig

BLOCK_SIZE = 128
TARGETS = r".*\.(self_attn|mlp)\..*_proj"  # a regular expression over module names; "all-linear" takes the head as well


def training_arguments(options: argparse.Namespace) -> TrainingArguments:
    """The one place where GaLore is asked for: `optim_args` and `optim_target_modules`."""
    optim_args = f"rank={options.rank},update_proj_gap={options.update_proj_gap},scale=0.25"
    optim_args += f",state_bits={options.state_bits},layerwise={options.layerwise}"
    return TrainingArguments(
        options.output_dir,
        optim="stable_spam",
        optim_args=optim_args,
        optim_target_modules=TARGETS,
        learning_rate=options.learning_rate,
        max_grad_norm=0,
        max_steps=options.steps,
        per_device_train_batch_size=16,
        lr_scheduler_type="cosine",
        warmup_steps=options.steps // 10,
        seed=options.seed,
        save_strategy="no",
        logging_steps=max(1, options.steps // 10),
        report_to="none",
    )


def state_bytes(trainer: Trainer) -> int:
    """Bytes that the optimizer holds; a low-bit moment keeps codes, scales and a table of levels."""
    total = 0
    for state in trainer.optimizer.state.values():
        for value in state.values():
            parts = (value.codes, value.scale, value.qmap) if hasattr(value, "codes") else (value,)
            total += sum(part.numel() * part.element_size() for part in parts)
    return total


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200, help="update steps")
    parser.add_argument("--learning_rate", type=float, default=1e-2, help="GaLore's; its scale of 0.25 divides it")
    parser.add_argument("--rank", type=int, default=32, help="directions kept; the hidden size is 128")
    parser.add_argument("--update_proj_gap", type=int, default=50, help="steps between new directions")
    parser.add_argument("--state_bits", type=int, default=32, help="bits of the moments: 32, 8 or 4")
    parser.add_argument("--layerwise", action="store_true", help="update during the backward pass")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--dataset_name", help="hub name, folder or file; default: Python's standard library")
    parser.add_argument("--output_dir", default="runs/galore")
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args(command_line)
    if options.smoke:
        options.steps = 4

    arguments = training_arguments(options)
    set_seed(options.seed)
    blocks = 16 if options.smoke else 512
    data = DataArguments(dataset_name=options.dataset_name, block_size=BLOCK_SIZE, max_eval_samples=blocks)
    train, validation, tokenizer = load_data(data, ModelArguments(), options.seed)
    trainer = Trainer(
        llama("tiny", tokenizer, BLOCK_SIZE),
        arguments,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=default_data_collator,
        callbacks=[FourBitCallback(FourBitConfig(weight="int4", activation="int4"))],
    )
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    held = state_bytes(trainer)
    adamw = sum(8 * param.numel() for param in trainer.model.parameters())
    print(f"\nvalidation loss after {options.steps} steps in INT4: {loss:.3f}")
    print(f"optimizer state: {held:,} bytes, {1 - held / adamw:.1%} below AdamW's {adamw:,}")


if __name__ == "__main__":
    main()
