"""Ways to spend compute on one utterance, and what the judge makes of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hf_stablespam.recipes.llasa import SearchResult, best_of_n, combine, process_beam_search, speech_prompt
from speech.studio import INSTRUCTION, Studio
from speech.voices import Utterance

# The codec's 64 codes repeat within a vowel, so there is no penalty for it; X-codec2's 65,536 hardly ever do.
SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 0}
CHUNK, UNTIL = 6, 12

Method = Callable[[Any, Studio, str, str], SearchResult]


def best_of(n: int, verifier: str) -> Method:
    """The best of `n` samples by "content", "voice" or "both"."""

    def method(model: Any, studio: Studio, text: str, voice: str) -> SearchResult:
        limits = {"vocabulary": studio.vocabulary, "max_new_tokens": studio.max_codes}
        content, similar = studio.content_verifier(text), studio.voice_verifier(voice)
        judges = {"content": content, "voice": similar, "both": combine({content: 1.0, similar: 1.0})}
        return best_of_n(model, _prompt(studio, text), judges[verifier], n, **limits, **SAMPLING)

    return method


def process(until: int | None, width: int = 4) -> Method:
    """Beam search by voice to the end, or for `until` codes and then the best by content."""

    def method(model: Any, studio: Studio, text: str, voice: str) -> SearchResult:
        return process_beam_search(
            model,
            _prompt(studio, text),
            studio.voice_verifier(voice),
            vocabulary=studio.vocabulary,
            max_new_tokens=studio.max_codes,
            beam_width=width,
            expansions=width,
            chunk_size=CHUNK,
            until=until,
            final_verifier=None if until is None else studio.content_verifier(text),
            **SAMPLING,
        )

    return method


METHODS: dict[str, Method] = {
    "one sample": best_of(1, "content"),
    "best of 16, content": best_of(16, "content"),
    "best of 16, voice": best_of(16, "voice"),
    "best of 16, both": best_of(16, "both"),
    "process search, voice": process(None),
    f"process search to {UNTIL} codes, then content": process(UNTIL),
}


def results(
    model: Any, studio: Studio, method: Method, tests: Sequence[Utterance], seed: int = 0
) -> tuple[list[SearchResult], dict[str, float]]:
    """What a method finds for each test's text and voice, and the means of the judge's verdicts and of CPU seconds."""
    torch.manual_seed(seed)
    found, verdicts = [], []
    seconds = 0.0
    for test in tests:
        start = time.process_time()
        found.append(method(model, studio, test.text, test.voice))
        seconds += time.process_time() - start
        verdicts.append(studio.judged(found[-1].codes, test.text, test.voice))
    means = {name: sum(v[name] for v in verdicts) / len(verdicts) for name in ("error", "voice")}
    return found, {**means, "seconds": seconds / len(tests)}


def _prompt(studio: Studio, text: str) -> list[int]:
    return speech_prompt(studio.tokenizer, studio.vocabulary, text, instruction=INSTRUCTION)
