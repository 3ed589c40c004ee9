"""`score_responses`: rewards from any function or any reward model."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers.utils import logging

from hf_stablespam._evaluating import evaluating
from hf_stablespam._names import nearest

logger = logging.get_logger(__name__)

Reward = Callable[[Sequence[Any], Sequence[Any]], Sequence[float]]


def score_responses(
    responses: Dataset | Sequence[Mapping[str, Any]],
    reward: Reward | nn.Module,
    processing_class: Any = None,
    *,
    prompt_key: str = "prompt",
    response_key: str = "response",
    score_key: str = "reward",
    batch_size: int = 8,
    max_length: int | None = None,
) -> Dataset:
    """Add the column of rewards ``r(x, y)``.

    Args:
        responses: rows with a prompt and an answer, for example of `sample_responses`.
        reward: a function of a list of prompts and a list of answers that returns a number for each; or a model for
            sequence classification with one label, or whose output has a ``score`` (ArmoRM).
        processing_class: the reward model's tokenizer. With a chat template, prompt and answer are rendered as a
            conversation, strings as messages of user and assistant; without one they are tokenized as a pair, with the
            segments of a model that has them (BERT, ELECTRA).
        prompt_key: column of the prompts.
        response_key: column of the answers.
        score_key: name of the new column.
        batch_size: rows scored together.
        max_length: cut longer inputs of the reward model to so many tokens, at their end; how many were cut is
            logged. None: nothing is cut.

    Returns:
        The rows with the new column, of 64-bit floats.

    Raises:
        ValueError: a missing column, one called `score_key` already, a reward that is no finite number or not one for
            each row, or a reward model with more than one label.
        TypeError: `reward` is neither, or a model without its tokenizer.

    Example:
        >>> rows = [{"prompt": "2 + 2 =", "response": "4"}, {"prompt": "2 + 2 =", "response": "five"}]
        >>> score_responses(rows, lambda prompts, answers: [float(text.isdigit()) for text in answers])["reward"][:]
        [1.0, 0.0]
    """
    dataset = responses if isinstance(responses, Dataset) else Dataset.from_list([dict(row) for row in responses])
    for key in (prompt_key, response_key):
        if key not in dataset.column_names:
            raise ValueError(
                f"responses must have a column {key!r}{nearest(key, dataset.column_names)},"
                f" its columns are {', '.join(map(repr, dataset.column_names)) or 'none'}"
            )
    if score_key in dataset.column_names:
        raise ValueError(f"responses have a column {score_key!r} already; remove it, or give another score_key")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}")
    if isinstance(reward, nn.Module):
        if processing_class is None:
            raise TypeError("a reward model needs its tokenizer, got processing_class=None")
        model = _RewardModel(reward, processing_class, max_length)
        if model.pad is None:
            logger.info("the reward model has no padding token, so its inputs go through one by one")
            batch_size = 1
        reward = model
    elif not callable(reward):
        raise TypeError(f"reward must be a function or a model, got {type(reward).__name__}")
    scores: list[float] = []
    texts = dataset.select_columns(list(dict.fromkeys([prompt_key, response_key])))
    for start in logging.tqdm(range(0, len(dataset), batch_size), desc="Scoring"):
        batch = texts[start : start + batch_size]
        scores += _checked(reward(batch[prompt_key], batch[response_key]), len(batch[prompt_key]), start)
    return dataset.add_column(score_key, scores)


def _checked(values: Any, rows: int, start: int) -> list[float]:
    """One finite number for each row."""
    values = values.tolist() if hasattr(values, "tolist") else [_plain(value) for value in values]
    if len(values) != rows:
        raise ValueError(f"reward must return a number for each row, got {len(values)} for {rows} rows")
    for row, value in enumerate(values, start):
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"reward must be a finite number, got {value!r} for row {row}")
    return [float(value) for value in values]


def _plain(value: Any) -> Any:
    """A scalar of NumPy or PyTorch as Python's."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


class _RewardModel:
    """A sequence-classification model as a function of prompts and answers."""

    def __init__(self, model: Any, processing_class: Any, max_length: int | None) -> None:
        self.model, self.processing_class, self.max_length = model, processing_class, max_length
        self.tokenizer = getattr(processing_class, "tokenizer", processing_class)
        self.pad = model.config.pad_token_id if hasattr(model, "config") else None
        whole = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.has_segments = "token_type_ids" in inspect.signature(whole.forward).parameters
        self.cut = 0

    def __call__(self, prompts: Sequence[Any], responses: Sequence[Any]) -> list[float]:
        rows = [self._tokens(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        fillers = {"input_ids": 0 if self.pad is None else self.pad, "attention_mask": 0}
        if self.has_segments and "token_type_ids" in rows[0]:
            fillers["token_type_ids"] = getattr(self.tokenizer, "pad_token_type_id", 0)
        device = next(self.model.parameters()).device
        inputs = {name: _padded([row[name] for row in rows], filler).to(device) for name, filler in fillers.items()}
        with evaluating(self.model), torch.inference_mode():
            output = self.model(**inputs)
        scores = getattr(output, "score", None)
        if scores is None:
            scores = output.logits
            if scores.ndim != 2 or scores.shape[1] != 1:
                raise ValueError(
                    f"a reward model must have one label, the logits have the shape {tuple(scores.shape)}; load it with"
                    " num_labels=1, or pass a function that makes one number of them"
                )
        return scores.float().reshape(len(rows)).tolist()

    def _tokens(self, prompt: Any, response: Any) -> dict[str, list[int]]:
        """What the tokenizer returns for one row: the ids, and with them the segments of a pair."""
        if getattr(self.processing_class, "chat_template", None):
            conversation = _messages(prompt, "user") + _messages(response, "assistant")
            text = self.processing_class.apply_chat_template(conversation, tokenize=False)
            encoded = self.tokenizer(text, add_special_tokens=False)
        else:
            encoded = self.tokenizer(_text(prompt), _text(response))
        row = {name: encoded[name] for name in ("input_ids", "token_type_ids") if name in encoded}
        row["attention_mask"] = [1] * len(row["input_ids"])
        if self.max_length is not None and len(row["input_ids"]) > self.max_length:
            self.cut += 1
            if self.cut & (self.cut - 1) == 0:  # at 1, 2, 4, 8, …
                logger.warning("%d inputs were cut to max_length=%d tokens to be scored", self.cut, self.max_length)
            row = {name: values[: self.max_length] for name, values in row.items()}
        return row


def _padded(rows: Sequence[list[int]], filler: int) -> torch.Tensor:
    """(rows, width): each row and what fills it up on the right."""
    width = max(map(len, rows))
    return torch.tensor([row + [filler] * (width - len(row)) for row in rows])


def _messages(value: Any, role: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": value}] if isinstance(value, str) else list(value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "\n".join(message["content"] for message in value)
