"""Fuse several models into one with FuseChat-3.0: sample, score, build the data sets, SFT, DPO.

    python examples/fuse_models.py --output_dir runs/fused                    # a toy, made on the spot
    python examples/fuse_models.py --output_dir runs/fused --four_bit int4    # both stages in 4 bits, packed at the end

The toy: a prompt is a style and five letters (`Rabcde`), an answer eight letters that go on from the last one, each a
step from the letter before: R one on, S two on, U one back. The reward is 0.1 times the share of letters that follow
the style, nothing for an answer of another length. Three sources were taught one style well and the others badly, the
target all of them badly. Sampled answers of the three, the best for SFT and pairs of one source for DPO, teach it all.

What the toy does not show: that DPO is needed. With a reward for every letter, SFT on the best answers of *all* prompts
for as many steps is better than both stages as they are here; DPO alone, on a target that has not met such answers,
hardly moves it; and the rates of the toy say nothing about those of a real model (`benchmarks/fusechat_toy.py`
measures these). DPO can break the form of answers while it raises their reward: that is why the share of malformed ones
stands beside it.

The real thing takes a model, and scored answers or data sets made of them by `hf-stablespam fuse`:

    hf-stablespam fuse answers.jsonl -o data
    python examples/fuse_models.py --output_dir runs/fused --target meta-llama/Llama-3.2-1B-Instruct --data data \\
        --settings Llama-3.2-1B

The authors' data on the hub are FuseAI/FuseChat-3.0-SFT-Data and FuseAI/FuseChat-3.0-DPO-Data, their models
FuseAI/FuseChat-Llama-3.1-8B-Instruct, FuseAI/FuseChat-Qwen-2.5-7B-Instruct and others (names as recalled: look them
up); prompts are those of openbmb/UltraFeedback, Magpie-Align/Magpie-Pro-DPO-100K-v0.1, nvidia/HelpSteer2 and others,
the reward model RLHFlow/ArmoRM-Llama3-8B-v0.1.
"""

from __future__ import annotations

import argparse
import random
import string
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict, load_from_disk
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from hf_stablespam import FourBitConfig
from hf_stablespam.recipes.fusechat import (
    build_preference_dataset,
    fusion_report,
    paper_settings,
    sample_responses,
    score_responses,
    train_target,
)
from hf_stablespam.recipes.fusechat.report import as_text

LETTERS = string.ascii_lowercase
STEPS = {"R": 1, "S": 2, "U": -1}
ANSWER = 8  # letters
SAMPLING = {"temperature": 0.8, "max_new_tokens": ANSWER + 4, "batch_size": 500}


@dataclass
class Sizes:
    """How much of everything: enough to see the effect, within three minutes on two cores."""

    prompts: int = 1000
    held_out: int = 600
    pretraining: int = 250
    sft: int = 200
    dpo: int = 100


SMOKE = Sizes(prompts=24, held_out=12, pretraining=30, sft=2, dpo=2)


def rewards(prompts: list[str], responses: list[str]) -> list[float]:
    """0.1 × the share of letters that follow the prompt's style; 0 for a malformed answer."""
    return [
        0.1 * sum(follows(style, *pair) for pair in zip(text[-1] + answer, answer)) / ANSWER  # noqa: B905
        if well_formed(answer)
        else 0.0
        for (style, *text), answer in zip(prompts, responses, strict=True)
    ]


def follows(style: str, before: str, letter: str) -> bool:
    return LETTERS.index(letter) == (LETTERS.index(before) + STEPS[style]) % len(LETTERS)


def well_formed(answer: str) -> bool:
    return len(answer) == ANSWER and set(answer) <= set(LETTERS)


def make_prompts(count: int, source: random.Random) -> list[str]:
    return [source.choice("RSU") + "".join(source.choices(LETTERS, k=5)) for _ in range(count)]


def taught_answer(prompt: str, skill: float, source: random.Random) -> str:
    """Each letter follows the style with probability `skill`, and is any letter otherwise."""
    letters = [prompt[-1]]
    for _ in range(ANSWER):
        step = STEPS[prompt[0]] if source.random() < skill else source.randrange(len(LETTERS))
        letters.append(LETTERS[(LETTERS.index(letters[-1]) + step) % len(LETTERS)])
    return "".join(letters[1:])


def letters_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", "<unk>", *STEPS, *LETTERS]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=32
    )


def taught_model(skills: dict[str, float], tokenizer, steps: int, seed: int, folder: Path) -> LlamaForCausalLM:
    """A small Llama, pretrained on answers of these skills by style."""
    set_seed(seed)
    source = random.Random(seed)
    rows = []
    for prompt in make_prompts(steps * 64, source):
        ids = tokenizer(prompt + taught_answer(prompt, skills[prompt[0]], source))["input_ids"]
        rows.append({"input_ids": [*ids, tokenizer.eos_token_id], "labels": [*ids, tokenizer.eos_token_id]})
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    args = TrainingArguments(
        str(folder),
        optim="stable_spam",
        max_grad_norm=0.0,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        per_device_train_batch_size=64,
        max_steps=steps,
        logging_steps=50,
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
    )
    Trainer(model, args, train_dataset=rows, data_collator=default_data_collator).train()
    return model


def teach(sizes: Sizes, tokenizer, seed: int, folder: Path) -> tuple[dict[str, LlamaForCausalLM], LlamaForCausalLM]:
    """Three sources, each good at one style, and a target that is good at none."""
    sources = {}
    for index, style in enumerate(STEPS):
        skills = {other: 0.45 if other == style else 0.2 for other in STEPS}
        own_seed = 10 * seed + index
        sources[f"good at {style}"] = taught_model(skills, tokenizer, sizes.pretraining, own_seed, folder / "taught")
    return sources, taught_model(
        dict.fromkeys(STEPS, 0.2), tokenizer, sizes.pretraining, 10 * seed + 9, folder / "taught"
    )


def scored_answers(sources: dict, tokenizer, prompts: list[str], seed: int) -> Dataset:
    rows = []
    for name, model in sources.items():
        rows += sample_responses(model, tokenizer, prompts, source=name, seed=seed, **SAMPLING).to_list()
    return score_responses(rows, rewards, batch_size=1000)


def measure(model, tokenizer, prompts: list[str]) -> tuple[float, float]:
    """Mean reward in percent of the maximum, and percent of malformed answers, of one sampled answer a prompt."""
    rows = sample_responses(model, tokenizer, prompts, source="measured", num_responses=1, seed=1, **SAMPLING)
    answers = rows["response"][:]
    malformed = sum(not well_formed(answer) for answer in answers)
    return 1000 * sum(rewards(prompts, answers)) / len(answers), 100 * malformed / len(answers)


def toy_settings(folder: Path, sizes: Sizes, seed: int, sft: dict | None = None, dpo: dict | None = None):
    """The source's settings, with the steps and rates of the toy."""
    small = {
        "per_device_train_batch_size": 32,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "max_length": 32,
        "logging_steps": 10,
        "save_strategy": "no",
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "seed": seed,
    }
    first = {**small, "max_steps": sizes.sft, "learning_rate": 1e-3, **(sft or {})}
    second = {**small, "max_steps": sizes.dpo, "learning_rate": 1e-5, **(dpo or {})}
    return paper_settings(folder, "Llama-3.2-1B", sft=first, dpo=second)


def toy(options: argparse.Namespace) -> None:
    start, folder, sizes = time.monotonic(), options.output_dir, SMOKE if options.smoke else Sizes()
    tokenizer, source = letters_tokenizer(), random.Random(options.seed)
    sources, target = teach(sizes, tokenizer, options.seed, folder)
    prompts, held_out = make_prompts(sizes.prompts, source), make_prompts(sizes.held_out, source)
    results = {name: measure(model, tokenizer, held_out) for name, model in sources.items()}
    results["target"] = measure(target, tokenizer, held_out)
    # Four models of few steps may not agree on a scale of rewards; a smoke test takes any gap that is none.
    limits = {"min_gap": 1e-6, "max_gap": None} if options.smoke else {}
    data = build_preference_dataset(scored_answers(sources, tokenizer, prompts, options.seed), **limits)
    print(as_text(fusion_report(data)))
    sft_args, dpo_args = toy_settings(folder, sizes, options.seed)
    four_bit = FourBitConfig(options.four_bit, options.four_bit, group_size=32) if options.four_bit else None
    fused = train_target(target, tokenizer, data, sft_args, dpo_args, four_bit=four_bit, export=four_bit is not None)
    results["target + SFT"] = measure(after_sft(target, folder), tokenizer, held_out)
    results["target + SFT + DPO"] = measure(fused, tokenizer, held_out)
    print("Reward in % of the maximum, and malformed answers in %:")
    for name, (reward, malformed) in results.items():
        print(f"  {name:20} {reward:5.1f} {malformed:6.1f}")
    print(
        f"{time.monotonic() - start:.0f} s; curves and tables: hf-stablespam report {folder / 'sft'} {folder / 'dpo'}"
    )


def after_sft(target, folder: Path):
    """The model of the first stage, in 4 bits if the target has been trained so."""
    from hf_stablespam import convert_to_4bit

    model = type(target).from_pretrained(folder / "sft")
    layer = next((module for module in target.modules() if hasattr(module, "four_bit")), None)
    return model if layer is None else convert_to_4bit(model, layer.four_bit)


def real(options: argparse.Namespace) -> None:
    """A model of the hub or a folder, on data sets that `hf-stablespam fuse` has made."""
    if options.data is None:
        raise SystemExit("--target needs --data, a folder that `hf-stablespam fuse` has written")
    data = load_from_disk(options.data)
    assert isinstance(data, DatasetDict)
    tokenizer = AutoTokenizer.from_pretrained(options.target)
    # In float32: at learning rates of 1e-6 bfloat16 weights do not move.
    model = AutoModelForCausalLM.from_pretrained(options.target, dtype=torch.float32)
    changes = {"max_steps": 2, "max_length": 64, "per_device_train_batch_size": 2} if options.smoke else {}
    changes |= {"gradient_accumulation_steps": 1} if options.smoke else {}
    changes |= {} if torch.cuda.is_available() else {"use_cpu": True}
    sft_args, dpo_args = paper_settings(options.output_dir, options.settings, sft=changes, dpo=changes)
    four_bit = FourBitConfig(options.four_bit, options.four_bit) if options.four_bit else None
    train_target(
        model,
        tokenizer,
        data,
        sft_args,
        dpo_args,
        four_bit=four_bit,
        export=four_bit is not None,
        resume=options.resume,
    )


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/fused"), help="default runs/fused")
    parser.add_argument("--four_bit", help="format of weights and activations in both stages; default: full precision")
    parser.add_argument("--seed", type=int, default=0, help="of the toy; default 0")
    parser.add_argument("--target", help="a model to train instead of the toy's")
    parser.add_argument("--data", help="with --target: the data sets, from `hf-stablespam fuse`")
    parser.add_argument("--settings", default="Llama-3.2-1B", help="with --target: whose learning rates, β and loss")
    parser.add_argument("--resume", action="store_true", help="with --target: go on with a run that was killed")
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args(command_line)
    (real if options.target else toy)(options)


if __name__ == "__main__":
    main()
