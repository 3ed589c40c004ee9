"""`sample_responses`: several answers of one model to each prompt, in batches, going on where a killed run was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import GenerationConfig
from transformers.utils import logging

from hf_stablespam._evaluating import evaluating
from hf_stablespam.quant import fixed_weights

logger = logging.get_logger(__name__)

# What a model's own generation config says of its tokens counts; how it samples, these arguments say.
OWN = (
    *("bos_token_id", "eos_token_id", "pad_token_id"),
    *("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id"),
)


def sample_responses(
    model: Any,
    processing_class: Any,
    prompts: Sequence[str | list[dict[str, Any]]],
    *,
    source: str,
    num_responses: int = 5,
    temperature: float = 0.8,
    top_p: float = 0.95,
    repetition_penalty: float = 1.0,
    max_new_tokens: int = 512,
    batch_size: int = 8,
    seed: int = 0,
    output_file: str | os.PathLike[str] | None = None,
) -> Dataset:
    """Sample answers of one source model: ``y ~ p(y | x)`` at the temperature, from the nucleus of mass `top_p`.

    Each batch draws from a generator seeded by `seed`, `source` and the number of the batch; so a run that was killed
    and goes on gives what an undisturbed one gives. The global generators are left as they were.

    Args:
        model: a model with `generate`, on its device; its dropout is off meanwhile.
        processing_class: its tokenizer, or a processor with one.
        prompts: lists of chat messages, to which the tokenizer's chat template is applied, or strings, which are
            continued as they are.
        source: the model's name in the column ``source``.
        num_responses: answers to each prompt; the source of the method takes 5 for chat and 8 for code.
        temperature: of the softmax; 0 takes the likeliest token, and then one answer is enough. Qwen: 0.7.
        top_p: mass of the nucleus in (0, 1]; Qwen: 0.8.
        repetition_penalty: 1 for none; Qwen: 1.05. No other filter (top-k, min-p, beams) is applied, whatever the
            model's own generation config says; only its special tokens count.
        max_new_tokens: at most this many tokens an answer.
        batch_size: answers that are generated together.
        seed: of the draws.
        output_file: JSON-lines file that every batch is appended to, and beside it ``….settings.json``. Called again
            with the same arguments, what is there is kept and the rest is sampled. None: nothing is written.

    Returns:
        Columns prompt, response, source, and finished: whether the answer came to its end before `max_new_tokens`.

    Raises:
        ValueError: an option out of its range, a prompt that does not fit the model, or an `output_file` of another
            call.

    Example:
        >>> sample_responses(model, tokenizer, ["2 + 2 ="], source="llama", output_file="llama.jsonl")  # doctest: +SKIP
    """
    _check_options(prompts, num_responses, temperature, top_p, repetition_penalty, max_new_tokens, batch_size)
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    inputs = [_tokens(processing_class, tokenizer, prompt) for prompt in prompts]
    _check_lengths(model, inputs, max_new_tokens)
    if isinstance(prompts[0], str) and getattr(processing_class, "chat_template", None):
        logger.warning(
            "prompts are strings and are continued as they are, though the tokenizer has a chat template; give"
            " [{'role': 'user', 'content': …}] to have it applied"
        )
    options: dict[str, Any] = {"do_sample": temperature > 0, "repetition_penalty": repetition_penalty}
    if temperature > 0:
        options |= {"temperature": temperature, "top_p": top_p, "top_k": 0}
    options |= {"max_new_tokens": max_new_tokens, **_ends(model, tokenizer)}
    asked = [index for index in range(len(prompts)) for _ in range(num_responses)]
    record = _Record(
        output_file,
        {
            "prompts": hashlib.sha256(json.dumps(list(prompts), default=repr).encode()).hexdigest()[:16],
            **{"source": source, "num_responses": num_responses, "temperature": temperature, "top_p": top_p},
            **{"repetition_penalty": repetition_penalty, "max_new_tokens": max_new_tokens},
            **{"batch_size": batch_size, "seed": seed},
        },
    )
    record.keep_whole_batches(batch_size, len(asked))
    with evaluating(model), fixed_weights(model), _plain_generation(model):  # 4-bit layers round their weights once
        for start in logging.tqdm(range(len(record.rows), len(asked), batch_size), desc=f"Sampling {source}"):
            batch = asked[start : start + batch_size]
            answers = _generate(model, tokenizer, [inputs[i] for i in batch], options, f"{seed}/{source}/{start}")
            record.append(
                [
                    {"prompt": prompts[i], "response": text, "source": source, "finished": finished}
                    for i, (text, finished) in zip(batch, answers, strict=True)
                ]
            )
    return Dataset.from_list(record.rows)


@contextmanager
def _plain_generation(model: Any) -> Iterator[None]:
    """A generation config that has nothing but the special tokens of the model's own.

    A config that is passed to `generate` would be filled up from the model's.
    """
    owner = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = owner.generation_config
    owner.generation_config = GenerationConfig(**{name: getattr(own, name, None) for name in OWN})
    try:
        yield
    finally:
        owner.generation_config = own


class _Record:
    """The rows so far, in memory and, if there is a file, in it."""

    def __init__(self, file: str | os.PathLike[str] | None, settings: dict[str, Any]) -> None:
        self.path = None if file is None else Path(file)
        self.rows: list[dict[str, Any]] = []
        if self.path is None:
            return
        beside = self.path.with_name(self.path.name + ".settings.json")
        if self.path.exists():
            earlier = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else {}
            differing = [name for name in settings if earlier.get(name) != settings[name]]
            if differing:
                raise ValueError(
                    f"output_file {self.path} must be of a call with the same arguments, it differs in"
                    f" {', '.join(differing)}; give another file, or remove that one"
                )
            self.rows = list(_whole_lines(self.path))
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            beside.write_text(json.dumps(settings), encoding="utf-8")

    def keep_whole_batches(self, batch_size: int, total: int) -> None:
        """Drop a batch that was being written when the run was killed."""
        if len(self.rows) < total:
            self.rows = self.rows[: len(self.rows) // batch_size * batch_size]
        if self.path is not None and self.path.exists():
            whole = self.path.with_name(self.path.name + ".part")
            whole.write_text("".join(map(_line, self.rows)), encoding="utf-8")
            os.replace(whole, self.path)

    def append(self, rows: list[dict[str, Any]]) -> None:
        self.rows += rows
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(map(_line, rows)))


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of the file up to a line that was cut short."""
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


def _generate(
    model: Any, tokenizer: Any, inputs: list[list[int]], options: dict[str, Any], key: str
) -> list[tuple[str, bool]]:
    """One batch: the answers, and whether each came to its end."""
    width = max(map(len, inputs))
    pad, device = options["pad_token_id"], model.device
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in inputs], device=device)  # (batch, width)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in inputs], device=device)
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.inference_mode():
        torch.manual_seed(seed)
        output = model.generate(input_ids=ids, attention_mask=mask, **options)
    # A decoder's own first token is no answer, and in BART it is the end token.
    answers: Tensor = output[:, 1:] if model.config.is_encoder_decoder else output[:, width:]
    ends = torch.tensor(options["eos_token_id"] or [-1], device=device)
    finished = torch.isin(answers, ends).any(1).tolist()
    return list(zip(tokenizer.batch_decode(answers, skip_special_tokens=True), finished, strict=True))


def _tokens(processing_class: Any, tokenizer: Any, prompt: Any) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    text = processing_class.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _ends(model: Any, tokenizer: Any) -> dict[str, Any]:
    """The tokens that end an answer, the model's and the tokenizer's, and the one to pad with."""
    own = getattr(model.generation_config, "eos_token_id", None)
    ends = [own] if isinstance(own, int) else list(own or ())
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.append(tokenizer.eos_token_id)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0]
    return {"eos_token_id": ends or None, "pad_token_id": pad}


def _check_lengths(model: Any, inputs: list[list[int]], max_new_tokens: int) -> None:
    longest = max(range(len(inputs)), key=lambda index: len(inputs[index]))
    size, room = len(inputs[longest]), getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not size:
        raise ValueError("prompts must have at least one token, the longest has none; write something into them")
    if room is not None and size + max_new_tokens > room:
        raise ValueError(
            f"a prompt and max_new_tokens must fit into the model's {room} positions, prompt {longest} has {size}"
            f" tokens and max_new_tokens is {max_new_tokens}; shorten either"
        )


def _check_options(
    prompts: Any,
    num_responses: int,
    temperature: float,
    top_p: float,
    repetition_penalty: float,
    max_new_tokens: int,
    batch_size: int,
) -> None:
    if isinstance(prompts, str) or not len(prompts):
        raise ValueError("prompts must be a list of at least one prompt; put a single one into a list")
    counts = {"num_responses": num_responses, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    if not temperature >= 0:
        raise ValueError(f"temperature must be at least 0, got {temperature!r}; 0.8 is usual, 0 the likeliest token")
    if temperature == 0 and num_responses > 1:
        raise ValueError(
            f"temperature=0 gives the same answer every time, num_responses must be 1 then, got {num_responses}"
        )
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p!r}; 1 takes every token")
    if not repetition_penalty > 0:
        raise ValueError(f"repetition_penalty must be above 0, got {repetition_penalty!r}; 1 is none")
