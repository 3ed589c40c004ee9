"""An ordinary Trainer script: it knows nothing of Stable-SPAM. The launcher gives it all of it, unchanged.

    python examples/plain_trainer.py --output_dir runs/plain
    python -m hf_stablespam --four-bit int4 --gradient-norms \\
        examples/plain_trainer.py --output_dir runs/plain --optim stable_spam --max_grad_norm 0

Trains a small Llama on bytes: of Python's standard library, or of `--dataset_name` from the hub.
"""

import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments


@dataclass
class ScriptArguments:
    dataset_name: str | None = field(default=None, metadata={"help": "Data set of the hub with a column `text`."})
    block_size: int = field(default=128, metadata={"help": "Bytes per sequence."})
    smoke: bool = field(default=False, metadata={"help": "A few steps, to see that it runs."})


class ByteBlocks(torch.utils.data.Dataset):
    def __init__(self, texts, block_size):
        tokens = torch.frombuffer(bytearray(b"\0".join(text.encode() for text in texts)), dtype=torch.uint8)
        self.blocks = tokens[: len(tokens) // block_size * block_size].view(-1, block_size)

    def __len__(self):
        return len(self.blocks)

    def __getitem__(self, index):
        return {"input_ids": self.blocks[index].long(), "labels": self.blocks[index].long()}


def load_texts(dataset_name):
    if dataset_name:
        return load_dataset(dataset_name, split="train")["text"]
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return [file.read_text(encoding="utf-8", errors="replace") for file in files]


def main(command_line=None):
    parser = HfArgumentParser((ScriptArguments, TrainingArguments))
    script, args = parser.parse_args_into_dataclasses(command_line)
    if script.smoke:
        args.max_steps = 5
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    torch.manual_seed(args.seed)
    dataset = ByteBlocks(load_texts(script.dataset_name), script.block_size)
    trainer = Trainer(LlamaForCausalLM(config), args, train_dataset=dataset)
    trainer.train()
    trainer.save_state()


if __name__ == "__main__":
    main()
