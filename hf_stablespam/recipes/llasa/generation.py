"""Continuations of speech by `model.generate`, chunk after chunk, with the cache of those that go on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import LogitsProcessorList

from hf_stablespam.recipes.llasa.logits_processor import SpeechTokensLogitsProcessor
from hf_stablespam.recipes.llasa.selection import Candidate
from hf_stablespam.recipes.llasa.vocabulary import SpeechVocabulary, check_rows

# Of the official inference (lora_infer_example.py); they hold where a call gives no sampling option of its own.
OFFICIAL_SAMPLING = {"do_sample": True, "temperature": 0.8, "top_p": 1.0, "repetition_penalty": 1.2}
OFFICIAL_MAX_LENGTH = 2048
_LENGTHS = ("max_length", "max_new_tokens")
_UNSET_LENGTH = 20  # `max_length` of a generation config that gives none, before transformers 5
_OURS = (
    "input_ids",
    "inputs",
    "attention_mask",
    "past_key_values",
    "eos_token_id",
    "return_dict_in_generate",
    "num_return_sequences",
    "num_beams",
    "min_new_tokens",
    "streamer",
)
_ANEW = ("max_time", "exponential_decay_length_penalty", "begin_suppress_tokens", "forced_eos_token_id")
_INSTEAD = {"min_new_tokens": ", and give min_codes: it would begin anew in every chunk"}


class Continuations:
    """Draws continuations of live candidates.

    Args:
        model: causal language model.
        inputs: the prompt: ids, a tensor of (tokens,) or (1, tokens), or what a tokenizer returns.
        vocabulary: what `add_speech_tokens` returned.
        generate_kwargs: options of `model.generate`.
        min_codes: codes before the end of speech is allowed.
        use_cache: keep keys and values of live candidates from chunk to chunk.
    """

    def __init__(
        self,
        model: Any,
        inputs: Any,
        vocabulary: SpeechVocabulary,
        generate_kwargs: Mapping[str, Any],
        *,
        min_codes: int = 1,
        use_cache: bool = True,
    ) -> None:
        config = generate_kwargs.get("generation_config")
        asked = {*generate_kwargs} | (
            {"min_new_tokens"} if getattr(config, "min_new_tokens", None) is not None else set()
        )
        for name in _OURS:
            if name in asked:
                raise ValueError(f"{name} is set by the search itself; leave it out{_INSTEAD.get(name, '')}")
        check_rows(model, vocabulary)
        self.model = model
        self.vocabulary = vocabulary
        self.prompt = prompt_ids(inputs).to(model.device)  # (tokens,)
        self.max_new_tokens = _max_new_tokens(generate_kwargs, len(self.prompt))
        self.use_cache = use_cache
        self.cache: Any = None
        options = {name: value for name, value in generate_kwargs.items() if name not in _LENGTHS}
        processors = [
            SpeechTokensLogitsProcessor(vocabulary, min_codes, prompt_length=len(self.prompt)),
            *options.pop("logits_processor", []),
        ]
        self.options = {**_sampling(options), "logits_processor": LogitsProcessorList(processors)}

    def extend(self, live: list[Candidate], continuations: int, length: int) -> list[Candidate]:
        """`continuations` of up to `length` codes for each live candidate, which all have the same number of codes."""
        parents = [index for index in range(len(live)) for _ in range(continuations)]
        written = torch.tensor([self.vocabulary.encode(live[parent].codes) for parent in parents], dtype=torch.long)
        prompt = self.prompt.expand(len(parents), -1)
        ids = torch.cat([prompt, written.to(prompt.device).view(len(parents), -1)], dim=1)
        output = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=length,
            # Nor what the model's own generation config, or one that is passed, says of them.
            **{"min_new_tokens": None, "num_beams": 1, "num_return_sequences": 1},
            eos_token_id=self.vocabulary.end_id,
            pad_token_id=self.vocabulary.end_id,
            return_dict_in_generate=True,
            use_cache=self.use_cache,
            **self._cache_of([live[parent].row for parent in parents]),
            **self.options,
        )
        self.cache = output.get("past_key_values")
        return [
            self._candidate(live[parent], new, parent, row)
            for row, (parent, new) in enumerate(zip(parents, output.sequences[:, ids.shape[1] :].tolist(), strict=True))
        ]

    def _candidate(self, live: Candidate, new: list[int], parent: int, row: int) -> Candidate:
        finished = self.vocabulary.end_id in new
        if finished:
            new = new[: new.index(self.vocabulary.end_id)]
        return Candidate([*live.codes, *self.vocabulary.decode(new)], finished, parent=parent, row=row)

    def _cache_of(self, rows: list[int]) -> dict[str, Any]:
        """The cache of these rows of the last batch, as `generate` takes it; nothing where there is none to keep.

        A static cache has the method, but its layers do not: each chunk reads its prefix anew then.
        """
        parts = [self.cache, *getattr(self.cache, "layers", ())]
        if not all(hasattr(part, "batch_select_indices") for part in parts):
            return {}
        self.cache.batch_select_indices(torch.tensor(rows, device=self.prompt.device))
        return {"past_key_values": self.cache}


def check_in_chunks(model: Any, generate_kwargs: Mapping[str, Any]) -> None:
    """No option counts from where a call of `generate` begins, or looks at where it ends.

    Raises:
        ValueError: one does, given to the search or in a generation config.
    """
    configs = generate_kwargs.get("generation_config"), getattr(model, "generation_config", None)
    for name in _ANEW:
        values = generate_kwargs.get(name), *(getattr(config, name, None) for config in configs)
        if (value := next((value for value in values if value is not None), None)) is not None:
            raise ValueError(
                f"{name} must be None in a search by chunks, got {value!r}: it would begin anew in every chunk; leave "
                "it out (of the generation config too), or use best_of_n"
            )


def prompt_ids(inputs: Any) -> torch.Tensor:
    """(tokens,) of int64 from whatever holds one prompt."""
    if hasattr(inputs, "keys"):
        mask = inputs.get("attention_mask")
        inputs = inputs["input_ids"]
        if mask is not None and not bool(torch.as_tensor(mask).all()):
            raise ValueError("inputs must be one prompt without padding, but its attention_mask has zeros")
    ids = torch.as_tensor(inputs)
    if ids.ndim == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.ndim != 1 or ids.numel() == 0 or ids.is_floating_point():
        raise ValueError(
            f"inputs must be one prompt: a list of ids, or a tensor of (tokens,) or (1, tokens), got shape "
            f"{tuple(ids.shape)} of {ids.dtype}; search for each prompt on its own"
        )
    return ids.long()


def _sampling(options: dict[str, Any]) -> dict[str, Any]:
    """All options of the caller, or all of the official inference: never half of each."""
    asked = {*OFFICIAL_SAMPLING, "generation_config", "top_k", "min_p", "typical_p"} & set(options)
    return options if asked else {**OFFICIAL_SAMPLING, **options}


def _max_new_tokens(options: Mapping[str, Any], prompt_length: int) -> int:
    """As `generate` reads them: new tokens before a length, and an option before the generation config passed."""
    config = options.get("generation_config")
    given = (options.get("max_new_tokens"), getattr(config, "max_new_tokens", None))
    most = next((value for value in given if value is not None), None)
    if most is None:
        length = getattr(config, "max_length", None)
        length = None if length == _UNSET_LENGTH else length
        most = (options.get("max_length") or length or OFFICIAL_MAX_LENGTH) - prompt_length
    if most < 1:
        raise ValueError(
            f"max_length must be above the prompt's {prompt_length} tokens, got {prompt_length + most}; raise it, or "
            "give max_new_tokens"
        )
    return most
