"""Train in 4 bits, write a packed 4-bit checkpoint, load it with plain transformers, and let it write.

    python examples/export_and_generate.py --output_dir runs/export
    python examples/export_and_generate.py --output_dir runs/export --four_bit nvfp4 --max_steps 1000 \\
        --prompt "def read_file(path):"

The packed checkpoint is what inference engines read. Here it is loaded by `AutoModelForCausalLM.from_pretrained`,
which needs the package compressed-tensors and nothing of ours. Data: Python's standard library, or `--dataset_name`.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from corpus import TokenBlocks, load_standard_library
from pretrain import llama
from text_data import load_text_data
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, Trainer, TrainingArguments

from hf_stablespam import FourBitCallback, FourBitConfig

BLOCK_SIZE = 128


@dataclass
class ScriptArguments:
    dataset_name: str | None = field(default=None, metadata={"help": "Hub name, folder or file."})
    four_bit: str = field(default="int4", metadata={"help": "Format of weights and inputs."})
    group_size: int = field(default=32, metadata={"help": "Numbers that share a scale; must divide the rows."})
    prompt: str = field(default="def main(", metadata={"help": "What the model continues."})
    new_tokens: int = field(default=60, metadata={"help": "How far it continues."})
    smoke: bool = field(default=False, metadata={"help": "A few steps, to see that it runs."})


def main(command_line: list[str] | None = None) -> None:
    parser = HfArgumentParser((ScriptArguments, TrainingArguments))
    parser.set_defaults(
        optim="stable_spam", max_grad_norm=0.0, learning_rate=3e-3, max_steps=200, logging_steps=20, save_strategy="no"
    )
    script, args = parser.parse_args_into_dataclasses(command_line)
    if script.smoke:
        args.max_steps, args.logging_steps, script.new_tokens = 4, 2, 8
    if script.dataset_name:
        blocks, _, tokenizer = load_text_data(script.dataset_name, vocab_size=2048, block_size=BLOCK_SIZE)
    else:
        corpus = load_standard_library()
        blocks, tokenizer = TokenBlocks(corpus.train, BLOCK_SIZE), corpus.tokenizer

    config = FourBitConfig(script.four_bit, script.four_bit, group_size=script.group_size)
    model = llama("tiny", tokenizer, BLOCK_SIZE)
    trainer = Trainer(
        model,
        args,
        train_dataset=blocks,
        processing_class=tokenizer,
        callbacks=[FourBitCallback(config, export=True)],
    )
    trainer.train()
    trainer.save_model()  # an ordinary checkpoint beside it, with the weights in full precision

    packed = Path(args.output_dir, "4bit")
    sizes = [path.stat().st_size for path in (Path(args.output_dir, "model.safetensors"), packed / "model.safetensors")]
    print(f"full precision: {sizes[0]:,} bytes; packed: {sizes[1]:,} bytes ({sizes[1] / sizes[0]:.0%})")
    print(generate(packed, script.prompt, script.new_tokens))


def generate(folder: Path, prompt: str, new_tokens: int) -> str:
    """What the model in `folder` writes after `prompt`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return tokenizer.decode(output[0])


if __name__ == "__main__":
    main(sys.argv[1:])
