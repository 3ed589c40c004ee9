"""`best_of_n` and `process_beam_search`: more compute at inference, spent where verifiers say it pays."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch

from hf_stablespam._evaluating import evaluating
from hf_stablespam.quant import fixed_weights
from hf_stablespam.recipes.llasa.generation import Continuations, check_in_chunks
from hf_stablespam.recipes.llasa.selection import (
    Candidate,
    SearchResult,
    SearchStep,
    Verifier,
    at_least_one,
    beam_search,
    choose,
    scored,
)
from hf_stablespam.recipes.llasa.vocabulary import SpeechVocabulary

logger = logging.getLogger(__name__)

_START = Candidate([], finished=False)


@torch.no_grad()
def best_of_n(
    model: Any,
    inputs: Any,
    verifier: Verifier,
    n: int = 16,
    *,
    vocabulary: SpeechVocabulary,
    min_codes: int = 1,
    **generate_kwargs: Any,
) -> SearchResult:
    """Sample `n` candidates and return the one that a verifier scores highest (output reward).

    Only finished candidates can win; where none is finished the best unfinished one does, with a warning. Of two with
    the same score the first wins. The model is in eval mode meanwhile, and randomness is torch's global one.

    Args:
        model: causal language model with rows for the vocabulary, 4-bit or not.
        inputs: one prompt: what `speech_prompt` returns, a tensor of (tokens,) or (1, tokens), or a mapping with
            ``input_ids``.
        verifier: (codes of the candidates) → a score for each, higher is better.
        n: candidates; default 16.
        vocabulary: what `add_speech_tokens` returned.
        min_codes: codes before a candidate may end.
        **generate_kwargs: options of `model.generate`. Without any sampling option those of the official inference
            hold (temperature 0.8, top-p 1, repetition penalty 1.2); with one, the others are the model's own. Without
            `max_new_tokens` or `max_length`, here or in a `generation_config`, a sequence has at most 2048 tokens.

    Returns:
        The winner, and all candidates with their scores.

    Raises:
        ValueError: `n` below 1; a model without rows for the vocabulary; a prompt that is none or is longer than
            `max_length`; another number of scores than candidates, or one that is not finite.

    Example:
        >>> prompt = speech_prompt(tokenizer, vocabulary, "Hello.")  # doctest: +SKIP
        >>> best_of_n(model, prompt, verifier, vocabulary=vocabulary).codes  # doctest: +SKIP
        [51713, 2087, ...]
    """
    at_least_one(n=n)
    continuations = Continuations(model, inputs, vocabulary, generate_kwargs, min_codes=min_codes)
    with evaluating(model), fixed_weights(model):  # 4-bit layers round their weights once
        candidates = continuations.extend([_START], n, continuations.max_new_tokens)
    return _result(scored(candidates, verifier))


@torch.no_grad()
def process_beam_search(
    model: Any,
    inputs: Any,
    verifier: Verifier,
    *,
    vocabulary: SpeechVocabulary,
    beam_width: int = 4,
    expansions: int = 4,
    chunk_size: int = 50,
    until: int | None = None,
    final_verifier: Verifier | None = None,
    min_codes: int = 1,
    use_cache: bool = True,
    **generate_kwargs: Any,
) -> SearchResult:
    """Beam search over chunks of codes by a verifier of unfinished speech (process reward), then perhaps another one.

    Each step draws ``beam_width · expansions`` continuations of `chunk_size` codes in all, spread over the live beams,
    and keeps the `beam_width` best. Finished ones leave the beam; the best of them is the result. With `until` the
    beam search stops after that many codes: the live beams are completed ``beam_width · expansions`` times in all, and
    the best of those and of the finished ones by `final_verifier` is the result (partial process reward): a speaker
    encoder for the process, say, and a recogniser at the end.

    Args:
        model: causal language model with rows for the vocabulary, 4-bit or not.
        inputs: one prompt, as for `best_of_n`.
        verifier: (codes of the candidates) → a score for each, higher is better; sees unfinished speech.
        vocabulary: what `add_speech_tokens` returned.
        beam_width: candidates that are kept in a step; default 4.
        expansions: continuations of each of a full beam; default 4.
        chunk_size: codes that a step appends; default 50, one second of X-codec2.
        until: codes after which the beam search stops and the live beams are completed; default None, to the end.
            100 is a sensible value for X-codec2.
        final_verifier: who chooses among completed candidates; default None, `verifier`.
        min_codes: codes before a candidate may end.
        use_cache: keep keys and values of the beams from chunk to chunk; False reads each prefix anew, with equal
            results, as is done where rows of a cache cannot be chosen (``cache_implementation="static"``).
        **generate_kwargs: options of `model.generate`, as for `best_of_n`.

    Returns:
        The winner, all candidates of the last choice with their scores, and the steps.

    Raises:
        ValueError: a width, number or length below 1; `until` above the most codes that may be written; an option
            of `generate` that counts within one chunk, such as ``max_time``; and what `best_of_n` raises.

    Example:
        >>> process_beam_search(
        ...     model, prompt, speaker_similarity, vocabulary=vocabulary, until=100, final_verifier=word_error
        ... ).score  # doctest: +SKIP
        -0.0
    """
    at_least_one(beam_width=beam_width, expansions=expansions, chunk_size=chunk_size)
    check_in_chunks(model, generate_kwargs)
    continuations = Continuations(model, inputs, vocabulary, generate_kwargs, min_codes=min_codes, use_cache=use_cache)
    most = continuations.max_new_tokens
    if until is not None:
        at_least_one(until=until)
        if until > most:
            raise ValueError(f"until must be at most {most}, the codes that may be written, got {until}")
    sizes = {"beam_width": beam_width, "expansions": expansions, "chunk_size": chunk_size}
    with evaluating(model), fixed_weights(model):  # 4-bit layers round their weights once
        live, complete, steps = beam_search(continuations.extend, verifier, _START, num_codes=until or most, **sizes)
        if until is not None and until < most and live:
            live = continuations.extend(live, beam_width * expansions // len(live), most - until)
            if final_verifier is None:
                live = scored(live, verifier)
    candidates = [*complete, *live]
    if final_verifier is not None:
        candidates = scored(candidates, final_verifier)
    return _result(candidates, steps)


def _result(candidates: list[Candidate], steps: list[SearchStep] | None = None) -> SearchResult:
    scores = [candidate.score for candidate in candidates]
    finished = [candidate.finished for candidate in candidates]
    chosen = choose(scores, finished, [len(candidate.codes) for candidate in candidates])
    winner = Candidate([], False, -math.inf) if chosen is None else candidates[chosen]
    if not winner.finished:
        logger.warning(
            "none of %d candidates finished its speech; the best unfinished one is returned, with finished=False. "
            "Raise max_new_tokens, or train longer",
            len(candidates),
        )
    return SearchResult(
        winner.codes, winner.score, winner.finished, [c.codes for c in candidates], scores, finished, steps or []
    )
