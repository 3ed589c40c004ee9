"""The rules of FuseChat-3.0 on vectors: which answer is best, which two are a pair, which prompt trains which stage."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from hf_stablespam.recipes.fusechat.responses import Booleans, Floats, Integers, Responses

SLACK = 1e-9  # 0.15 − 0.14 is 0.00999… in floats, and a limit of 0.01 includes it


class Outcome(IntEnum):
    """What became of a source's answers to one prompt, from the farthest from a pair to a pair."""

    TOO_FEW = 0
    NO_CORRECT = 1
    NO_INCORRECT = 2
    GAP_BELOW = 3
    GAP_ABOVE = 4
    EQUAL_TEXT = 5
    PAIR = 6


@dataclass(frozen=True)
class Pairs:
    """The pairs that the rules admit.

    Args:
        prompt: number of the prompt, (pairs,), ascending.
        chosen: row of the better answer, (pairs,).
        rejected: row of the worse one, (pairs,).
        outcome: for each prompt how near its nearest source came to a pair, (prompts,); see `Outcome`.
        largest_below: for each prompt the largest gap that was below the minimum, (prompts,); nan where none was.
        smallest_above: likewise the smallest gap that was above the maximum, (prompts,).
    """

    prompt: Integers
    chosen: Integers
    rejected: Integers
    outcome: Integers
    largest_below: Floats
    smallest_above: Floats


def first_of_each(group: Integers, key: Floats, rows: Integers) -> Integers:
    """Among `rows`, for each group the row with the smallest key, the first of several; in the groups' order."""
    order = rows[np.lexsort((key[rows], group[rows]))]  # lexsort is stable
    ordered = group[order]
    return order[np.r_[True, ordered[1:] != ordered[:-1]]] if len(order) else order


def best_responses(responses: Responses) -> Integers:
    """For each prompt the row with the highest reward over all sources, among the correct ones where that is known."""
    return first_of_each(responses.prompt, -responses.score, rows_where(responses.correct, len(responses.score)))


def rows_where(flags: Booleans | None, length: int) -> Integers:
    """The rows whose flag is set; all rows without flags."""
    return np.arange(length) if flags is None else np.flatnonzero(flags)


def preference_pairs(
    responses: Responses, min_gap: float | None, max_gap: float | None, *, every_source: bool, same_source: bool
) -> Pairs:
    """Each source's best answer against its worst, within the limits of the gap; see `build_preference_dataset`."""
    score, correct = responses.score, responses.correct
    source = responses.source if same_source else np.zeros_like(responses.source)
    together = responses.prompt * (len(responses.sources) or 1) + source
    _, first, group, size = np.unique(together, return_index=True, return_inverse=True, return_counts=True)
    prompt = responses.prompt[first]  # (groups,)
    wrong = None if correct is None else ~correct
    chosen, rejected = np.full(len(first), -1), np.full(len(first), -1)
    for found, flags, key in ((chosen, correct, -score), (rejected, wrong, score)):
        rows = first_of_each(group, key, rows_where(flags, len(score)))
        found[group[rows]] = rows

    gap = np.where((chosen < 0) | (rejected < 0), np.nan, score[chosen] - score[rejected])
    outcome = np.full(len(first), Outcome.PAIR, np.int64)
    outcome[gap < (-math.inf if min_gap is None else min_gap - SLACK)] = Outcome.GAP_BELOW
    outcome[gap > (math.inf if max_gap is None else max_gap + SLACK)] = Outcome.GAP_ABOVE
    outcome[rejected < 0] = Outcome.NO_INCORRECT
    outcome[chosen < 0] = Outcome.NO_CORRECT
    outcome[size < 2] = Outcome.TOO_FEW
    passing = np.flatnonzero(outcome == Outcome.PAIR)
    outcome[passing[responses.same_text(chosen[passing], rejected[passing])]] = Outcome.EQUAL_TEXT

    admitted = np.flatnonzero(outcome == Outcome.PAIR)
    if every_source:
        kept = admitted[np.lexsort((first[admitted], prompt[admitted]))]
    else:
        # Of pairs with equally good chosen answers that with the largest gap: that with the worst rejected one.
        keys = (first[admitted], score[rejected[admitted]], -score[chosen[admitted]], prompt[admitted])
        ordered = admitted[np.lexsort(keys)]
        kept = first_of_each(prompt, np.zeros(len(first)), ordered)
    nearest = np.zeros(responses.prompts, np.int64)
    np.maximum.at(nearest, prompt, outcome)
    below, above = np.full(responses.prompts, np.nan), np.full(responses.prompts, np.nan)
    for extreme, collect, which in ((below, np.fmax, Outcome.GAP_BELOW), (above, np.fmin, Outcome.GAP_ABOVE)):
        collect.at(extreme, prompt[outcome == which], gap[outcome == which])
    return Pairs(prompt[kept], chosen[kept], rejected[kept], nearest, below, above)


def sft_prompts(prompts: int, fraction: float, seed: int) -> Booleans:
    """Which prompts train the first stage, (prompts,): ⌊fraction · n⌋ of them, drawn by `seed`."""
    order = list(range(prompts))
    random.Random(seed).shuffle(order)
    drawn = np.zeros(prompts, bool)
    drawn[order[: math.floor(fraction * prompts + 1e-9)]] = True
    return drawn
