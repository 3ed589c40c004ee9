"""Supervised fine-tuning with TRL's SFTTrainer: a LoRA adapter on a base in 4 bits, trained by Stable-SPAM.

    python examples/finetune_lora.py --output_dir runs/sft                                    # embedded data
    python examples/finetune_lora.py --output_dir runs/sft --model_name_or_path HuggingFaceTB/SmolLM2-135M \\
        --dataset_name trl-lib/Capybara --bf16

Embedded data: the docstrings of Python's standard library. The prompt is the head of a function, the completion the
first sentence of its docstring. Without `--model_name_or_path` the base is a small Llama with random weights, which
shows the way but learns little. Needs TRL: pip install trl.
"""

import ast
import sys
from dataclasses import dataclass, field

from corpus import load_standard_library, standard_library_documents
from datasets import Dataset, load_dataset
from peft import LoraConfig
from pretrain import llama
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

try:
    from trl import SFTConfig, SFTTrainer
except ImportError as error:
    raise SystemExit("examples/finetune_lora.py needs TRL: pip install trl") from error

from hf_stablespam import FourBitCallback, GradientNormCallback


@dataclass
class ScriptArguments:
    model_name_or_path: str | None = field(default=None, metadata={"help": "Default: a small Llama, untrained."})
    dataset_name: str | None = field(default=None, metadata={"help": "Hub name; any format that SFTTrainer reads."})
    lora_rank: int = field(default=16, metadata={"help": "Rank of the adapter."})
    smoke: bool = field(default=False, metadata={"help": "A few steps, to see that it runs."})


def docstrings(limit: int | None = None) -> Dataset:
    """Rows `prompt`, `completion`: the head of a function, and the first sentence of what it says it does."""
    rows: list[dict[str, str]] = []
    for _, text in standard_library_documents():
        rows += functions_with_docstrings(text)
        if limit is not None and len(rows) >= limit:
            break
    return Dataset.from_list(rows[:limit])


def functions_with_docstrings(text: str) -> list[dict[str, str]]:
    rows = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and (docstring := ast.get_docstring(node)):
            head = f"def {node.name}({ast.unparse(node.args)}):\n"
            rows.append({"prompt": head, "completion": docstring.split("\n\n")[0]})
    return rows


def main(command_line: list[str] | None = None) -> None:
    parser = HfArgumentParser((ScriptArguments, SFTConfig))
    parser.set_defaults(
        optim="stable_spam", max_grad_norm=0.0, learning_rate=1e-3, max_steps=100, logging_steps=10, max_length=256
    )
    script, args = parser.parse_args_into_dataclasses(command_line)
    if script.smoke:
        args.max_steps, args.logging_steps, args.per_device_train_batch_size = 3, 1, 2
    if script.model_name_or_path:
        model = AutoModelForCausalLM.from_pretrained(script.model_name_or_path)
        tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
    else:
        tokenizer = load_standard_library().tokenizer
        model = llama("tiny", tokenizer, block_size=args.max_length)
    if script.dataset_name:
        rows = load_dataset(script.dataset_name, split="train")
    else:
        rows = docstrings(limit=64 if script.smoke else None)
    trainer = SFTTrainer(
        model,
        args,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=script.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[FourBitCallback(), GradientNormCallback()],
    )
    trainer.train()
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    main(sys.argv[1:])
