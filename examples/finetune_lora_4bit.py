"""Fine-tune a LoRA adapter on a frozen base in 4 bits, with PEFT and the plain Trainer.

    python examples/finetune_lora_4bit.py --output_dir runs/lora                              # embedded data
    python examples/finetune_lora_4bit.py --output_dir runs/lora --model_name_or_path HuggingFaceTB/SmolLM2-135M \\
        --dataset_name Salesforce/wikitext --dataset_config_name wikitext-2-raw-v1 --bf16 --merge True

The base computes with weights and inputs of 4 bits, made once, since nothing changes them; only the adapter, in full
precision, is trained. With `--merge` the adapter is merged into the base, which is then written as a packed 4-bit
checkpoint. Without `--model_name_or_path` the base is a small Llama with random weights: it shows the way, no more.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from corpus import TokenBlocks, load_standard_library
from peft import LoraConfig, get_peft_model
from pretrain import llama
from text_data import load_text_data
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, Trainer, TrainingArguments

from hf_stablespam.quant import FourBitConfig, convert_to_4bit, export_4bit

BLOCK_SIZE = 128


@dataclass
class ScriptArguments:
    model_name_or_path: str | None = field(default=None, metadata={"help": "Default: a small Llama, untrained."})
    dataset_name: str | None = field(default=None, metadata={"help": "Hub name, folder or file."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Such as `en` of `allenai/c4`."})
    four_bit: str = field(default="int4", metadata={"help": "Format of the base's weights and inputs."})
    group_size: int = field(default=32, metadata={"help": "Numbers that share a scale."})
    lora_rank: int = field(default=16, metadata={"help": "Rank of the adapter."})
    merge: bool = field(default=False, metadata={"help": "Merge the adapter and write a packed 4-bit checkpoint."})
    smoke: bool = field(default=False, metadata={"help": "A few steps, to see that it runs."})


def load(script: ScriptArguments):
    """Base model, tokenizer and blocks of tokens."""
    name = script.model_name_or_path
    if script.dataset_name:
        blocks, _, tokenizer = load_text_data(
            script.dataset_name,
            script.dataset_config_name,
            tokenizer_name=name,
            vocab_size=2048,
            block_size=BLOCK_SIZE,
        )
    elif name:
        raise SystemExit("--model_name_or_path has its own tokens: give --dataset_name too")
    else:
        corpus = load_standard_library()
        blocks, tokenizer = TokenBlocks(corpus.train, BLOCK_SIZE), corpus.tokenizer
    if name:
        return AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name), blocks
    return llama("tiny", tokenizer, BLOCK_SIZE), tokenizer, blocks


def main(command_line: list[str] | None = None) -> None:
    parser = HfArgumentParser((ScriptArguments, TrainingArguments))
    parser.set_defaults(
        optim="stable_spam", max_grad_norm=0.0, learning_rate=1e-3, max_steps=100, logging_steps=10, save_strategy="no"
    )
    script, args = parser.parse_args_into_dataclasses(command_line)
    if script.smoke:
        args.max_steps, args.logging_steps, args.per_device_train_batch_size = 4, 2, 2
    model, tokenizer, blocks = load(script)
    convert_to_4bit(model, FourBitConfig(script.four_bit, script.four_bit, group_size=script.group_size))
    lora = LoraConfig(r=script.lora_rank, lora_alpha=2 * script.lora_rank, target_modules="all-linear")
    model = get_peft_model(model, lora)
    model.print_trainable_parameters()

    trainer = Trainer(model, args, train_dataset=blocks, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    if script.merge:
        folder = Path(args.output_dir, "merged-4bit")
        export_4bit(model.merge_and_unload(), folder, tokenizer)
        print(f"packed checkpoint: {folder}")


if __name__ == "__main__":
    main(sys.argv[1:])
