"""Which candidates go on, and which one wins: rules on scores and lengths, without a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

# Codes of some candidates → a score for each, higher is better. A verifier sees only what was generated.
Verifier = Callable[[list[list[int]]], Sequence[float]]


@dataclass(frozen=True)
class Candidate:
    """Speech that a search has written so far."""

    codes: list[int]
    finished: bool  # ended by the end-of-speech token, which is not among the codes
    score: float = -math.inf
    parent: int = 0  # index among the live beams that it continues
    row: int = 0  # index in the batch that generated it, where its cache lies


@dataclass(frozen=True)
class SearchStep:
    """One step of a beam search: what there was to choose from, and which of it went on."""

    candidates: list[Candidate]
    kept: list[int]  # indices into the candidates, best first


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Args:
        codes: the winner's codes, without the prompt's.
        score: its score by the verifier that chose it; −inf where every candidate is empty.
        finished: whether it ended by itself, with the end-of-speech token.
        candidates: codes of all candidates that it was chosen from.
        scores: their scores.
        candidates_finished: whether each of them ended by itself.
        steps: for each step of a beam search the candidates, with codes, finished and score, and the kept ones.
    """

    codes: list[int]
    score: float
    finished: bool
    candidates: list[list[int]]
    scores: list[float]
    candidates_finished: list[bool]
    steps: list[SearchStep] = field(default_factory=list, repr=False)


class SelectedBeams(NamedTuple):
    """Indices of candidates, each best first."""

    kept: list[int]
    live: list[int]
    complete: list[int]


def select_beams(scores: Sequence[float], finished: Sequence[bool], width: int) -> SelectedBeams:
    """The `width` best candidates of a step; of two with the same score the first.

    A finished candidate takes a place like any other, and leaves the beam.

    Args:
        scores: one for each candidate, higher is better.
        finished: whether each has ended.
        width: candidates to keep, at least 1.

    Returns:
        ``kept``, and what of it is ``live`` and ``complete``.

    Raises:
        ValueError: `width` below 1, or not as many `finished` as `scores`.

    Example:
        >>> select_beams([0.1, 0.9, 0.5, 0.7], [False, True, False, False], width=2)
        SelectedBeams(kept=[1, 3], live=[3], complete=[1])
    """
    at_least_one(width=width)
    if len(scores) != len(finished):
        raise ValueError(f"finished must have one entry for each of the {len(scores)} scores, got {len(finished)}")
    kept = sorted(range(len(scores)), key=lambda i: -scores[i])[:width]
    return SelectedBeams(kept, [i for i in kept if not finished[i]], [i for i in kept if finished[i]])


def choose(scores: Sequence[float], finished: Sequence[bool], lengths: Sequence[int]) -> int | None:
    """Index of the best finished and non-empty candidate, else the best non-empty one, else None; ties: the first."""
    filled = [i for i, length in enumerate(lengths) if length > 0]
    eligible = [i for i in filled if finished[i]] or filled
    return max(eligible, key=lambda i: scores[i], default=None)


def scored(candidates: Sequence[Candidate], verifier: Verifier) -> list[Candidate]:
    """The candidates with their scores by a verifier, which is asked once; an empty one gets −inf without being asked.

    Raises:
        ValueError: the verifier gives another number of scores than candidates, or one that is not finite.
    """
    asked = [i for i, candidate in enumerate(candidates) if candidate.codes]
    answers = list(verifier([candidates[i].codes for i in asked])) if asked else []
    if len(answers) != len(asked):
        raise ValueError(f"a verifier must return one score for each candidate: {len(answers)} for {len(asked)}")
    scores = [-math.inf] * len(candidates)
    for i, answer in zip(asked, answers, strict=True):
        scores[i] = float(answer)
        if not math.isfinite(scores[i]):
            codes = candidates[i].codes
            raise ValueError(
                f"a verifier's scores must be finite, got {scores[i]} for candidate {i} of {len(candidates)}, "
                f"which has {len(codes)} codes: {codes[:8]}{'…' if len(codes) > 8 else ''}"
            )
    return [
        Candidate(candidate.codes, candidate.finished, score, candidate.parent, candidate.row)
        for candidate, score in zip(candidates, scores, strict=True)
    ]


class BeamState(NamedTuple):
    """Where a beam search stands at its end."""

    live: list[Candidate]
    complete: list[Candidate]  # in the order of completion
    steps: list[SearchStep]


def beam_search(
    extend: Callable[[list[Candidate], int, int], list[Candidate]],
    verifier: Verifier,
    start: Candidate,
    *,
    beam_width: int,
    expansions: int,
    chunk_size: int,
    num_codes: int,
) -> BeamState:
    """Chunk-wise beam search by a process reward, until `num_codes` are written or no beam is live.

    Args:
        extend: (live candidates, continuations of each, length) → the continuations, parent after parent.
        verifier: scores of unfinished speech.
        start: what all candidates begin with.
        beam_width: candidates that are kept in a step.
        expansions: continuations of each of a full beam; fewer live candidates get more each.
        chunk_size: codes that a step appends.
        num_codes: codes at which the search stops, not counting those of `start`.
    """
    live: list[Candidate] = [start]
    complete: list[Candidate] = []
    steps: list[SearchStep] = []
    written = 0
    while live and written < num_codes:
        length = min(chunk_size, num_codes - written)
        candidates = scored(extend(live, beam_width * expansions // len(live), length), verifier)
        beams = select_beams([c.score for c in candidates], [c.finished for c in candidates], beam_width)
        steps.append(SearchStep(candidates, beams.kept))
        live = [candidates[i] for i in beams.live]
        complete += [candidates[i] for i in beams.complete]
        written += length
    return BeamState(live, complete, steps)


def at_least_one(**options: int) -> None:
    """Raises ValueError for the first option that is not an integer of at least 1."""
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
