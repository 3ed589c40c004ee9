"""Rescue a 4-bit run that AdamW does not carry: go on from its last good checkpoint with Stable-SPAM.

    python examples/rescue.py --output_dir runs/rescue                                  # both halves, on embedded data
    python examples/rescue.py --output_dir runs/rescue --checkpoint runs/mine/checkpoint-2000 --dataset_name ...

The weights go on; the optimizer's state does not, because moments that spikes have gone through are what is wrong.
Without `--checkpoint` a short run of AdamW in 4 bits, without clipping and at a high learning rate, makes one first.
"""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from corpus import TokenBlocks, evenly_spaced, load_standard_library
from pretrain import llama
from text_data import load_text_data
from transformers import AutoModelForCausalLM, HfArgumentParser, Trainer, TrainingArguments, default_data_collator

from hf_stablespam import FourBitCallback, GradientNormCallback

BLOCK_SIZE = 128


@dataclass
class ScriptArguments:
    checkpoint: str | None = field(default=None, metadata={"help": "Folder with the weights to go on from."})
    dataset_name: str | None = field(default=None, metadata={"help": "Hub name, folder or file."})
    smoke: bool = field(default=False, metadata={"help": "A few steps, to see that it runs."})


def main(command_line: list[str] | None = None) -> None:
    parser = HfArgumentParser((ScriptArguments, TrainingArguments))
    parser.set_defaults(learning_rate=1e-2, max_steps=100, logging_steps=10, warmup_steps=10, save_strategy="no")
    script, args = parser.parse_args_into_dataclasses(command_line)
    if script.smoke:
        args.max_steps, args.logging_steps = 4, 2

    train, validation, tokenizer = load_data(script)
    data = {"train_dataset": train, "eval_dataset": validation, "processing_class": tokenizer}
    checkpoint = script.checkpoint or str(Path(args.output_dir) / "adamw")
    if script.checkpoint is None:
        adamw = replace(args, optim="adamw_torch", max_grad_norm=0.0, output_dir=checkpoint)
        trainer = make_trainer(llama("tiny", tokenizer, BLOCK_SIZE), adamw, **data)
        trainer.train()
        trainer.save_model()
    rescued = replace(args, optim="stable_spam", max_grad_norm=0.0)
    trainer = make_trainer(AutoModelForCausalLM.from_pretrained(checkpoint), rescued, **data)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    print(f"validation loss: {before:.4f} at the checkpoint, {after:.4f} after {args.max_steps} steps of stable_spam")


def make_trainer(model, args, **data) -> Trainer:
    callbacks = [FourBitCallback(), GradientNormCallback()]
    return Trainer(model, args, data_collator=default_data_collator, callbacks=callbacks, **data)


def load_data(script: ScriptArguments):
    evaluated = 8 if script.smoke else 256
    if script.dataset_name is None:
        corpus = load_standard_library()
        validation = TokenBlocks(corpus.validation, BLOCK_SIZE)
        return TokenBlocks(corpus.train, BLOCK_SIZE), evenly_spaced(validation, evaluated), corpus.tokenizer
    # A checkpoint's tokens mean something only in its own vocabulary.
    tokenizer_name = script.checkpoint
    train, validation, tokenizer = load_text_data(
        script.dataset_name, tokenizer_name=tokenizer_name, vocab_size=2048, block_size=BLOCK_SIZE
    )
    return train, evenly_spaced(validation, evaluated), tokenizer


if __name__ == "__main__":
    main(sys.argv[1:])
