"""Monitoring alone: what does the gradient of a plain AdamW run look like?

    python examples/monitor_adamw.py --output_dir runs/monitor --report_to tensorboard

Nothing about the training changes; the logs gain the norm of the whole gradient, and its mean and maximum since the
log before, so that a spike between two logs is seen. Data: Python's standard library, or `--dataset_name`.
"""

import sys
from dataclasses import dataclass, field

from corpus import TokenBlocks, load_standard_library
from pretrain import llama
from text_data import load_text_data
from transformers import HfArgumentParser, Trainer, TrainingArguments

from hf_stablespam import GradientNormCallback

BLOCK_SIZE = 128


@dataclass
class ScriptArguments:
    dataset_name: str | None = field(default=None, metadata={"help": "Hub name, folder or file."})
    smoke: bool = field(default=False, metadata={"help": "A few steps, to see that it runs."})


def main(command_line: list[str] | None = None) -> None:
    parser = HfArgumentParser((ScriptArguments, TrainingArguments))
    parser.set_defaults(optim="adamw_torch", max_steps=200, logging_steps=10, learning_rate=3e-3)
    script, args = parser.parse_args_into_dataclasses(command_line)
    if script.smoke:
        args.max_steps, args.logging_steps = 4, 2
    if script.dataset_name:
        train, _, tokenizer = load_text_data(script.dataset_name, vocab_size=2048, block_size=BLOCK_SIZE)
    else:
        corpus = load_standard_library()
        train, tokenizer = TokenBlocks(corpus.train, BLOCK_SIZE), corpus.tokenizer

    model = llama("tiny", tokenizer, BLOCK_SIZE)
    trainer = Trainer(model, args, train_dataset=train, callbacks=[GradientNormCallback()])
    trainer.train()
    trainer.save_state()
    rows = [row for row in trainer.state.log_history if "gradients/norm" in row]
    print(f"{'step':>6} {'loss':>8} {'norm':>10} {'mean':>10} {'max':>10}")
    for row in rows:
        norms = (row[f"gradients/{name}"] for name in ("norm", "norm_mean", "norm_max"))
        print(f"{row['step']:>6} {float(row['loss']):>8.4f} " + " ".join(f"{norm:>10.3g}" for norm in norms))


if __name__ == "__main__":
    main(sys.argv[1:])
