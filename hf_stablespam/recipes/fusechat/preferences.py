"""`build_preference_dataset`: scored answers → one data set for SFT and one for DPO."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetDict

from hf_stablespam.recipes.fusechat.responses import Booleans, Integers, Responses, read_responses
from hf_stablespam.recipes.fusechat.selection import (
    Outcome,
    Pairs,
    best_responses,
    preference_pairs,
    sft_prompts,
)

REASONS = {
    Outcome.TOO_FEW: "too few answers",
    Outcome.NO_CORRECT: "no correct answer",
    Outcome.NO_INCORRECT: "no incorrect answer",
    Outcome.GAP_BELOW: "gap below min_gap",
    Outcome.GAP_ABOVE: "gap above max_gap",
    Outcome.EQUAL_TEXT: "equal answers",
}
NOTE = "fusechat"  # the key under which a data set's description says how it was made


def build_preference_dataset(
    responses: Dataset | Sequence[Mapping[str, Any]],
    *,
    prompt_key: str = "prompt",
    response_key: str = "response",
    source_key: str = "source",
    score_key: str = "reward",
    correct_key: str | None = None,
    min_gap: float | None = 0.01,
    max_gap: float | None = 0.1,
    sft_fraction: float | None = 0.4,
    pairs_per_prompt: Literal["best", "all"] = "best",
    same_source: bool = True,
    seed: int = 0,
) -> DatasetDict:
    """Make the two data sets of FuseChat-3.0 of scored answers: the best answers for SFT, pairs for DPO.

    Of each prompt x in the SFT part, ``argmax_y r(x, y)`` over the answers of all sources; of each prompt in the DPO
    part, ``(argmax_y r(x, y), argmin_y r(x, y))`` over the answers of *one* source, if
    ``min_gap ≤ r(chosen) − r(rejected) ≤ max_gap``. With `correct_key` only a correct answer is best and only an
    incorrect one worst; a wrong answer that scores too high yields no pair rather than another one. Ties go to the
    first in the input, the limits are inclusive (with 1e-9 of slack), equal texts are no pair. A prompt is in one part
    only. The same input gives the same output. `fusion_report` counts what came out and what was dropped.

    Args:
        responses: a row for each answer, in any order; texts of a `Dataset` stay where they are. Prompts are strings
            or lists of chat messages, which are compared by value and keep their form; an answer that is a string
            becomes an assistant's message where its prompt is a list, as TRL wants it.
        prompt_key: column of the prompts.
        response_key: column of the answers: strings, or lists of chat messages.
        source_key: column that names the model that answered.
        score_key: column of the rewards, finite numbers.
        correct_key: column of booleans, whether an answer is right; None where nothing is right or wrong.
        min_gap: smallest gap of a pair, in the reward's unit; None: no limit. 0.01 and 0.1 are the source's, for
            ArmoRM, whose rewards lie between about 0 and 0.2: other rewards need other limits.
        max_gap: largest gap of a pair; None: no limit.
        sft_fraction: share f of the prompts that train SFT, ⌊f · n⌋ of them, drawn with `seed`; 0.4 in the source's
            chat data. None, for maths and code: prompts with an admissible pair train DPO, all others SFT.
        pairs_per_prompt: of the sources' pairs ``"best"``, the one with the best chosen answer (then the largest gap,
            then the first), or ``"all"``.
        same_source: pair answers of one source only, as the source does; False: of all sources together, and the
            column ``rejected_source`` names the rejected answer's.
        seed: of the draw.

    Returns:
        ``"sft"`` with the columns prompt, completion, source, reward, and ``"dpo"`` with prompt, chosen, rejected,
        source, chosen_reward, rejected_reward; both in the order in which the prompts first appear.

    Raises:
        ValueError: an option out of its range, a missing column, no rows, a score that is no finite number, no pair
            or no SFT row left.
        TypeError: `responses` is something else, or `correct_key` is no column of booleans.

    Example:
        >>> answers = [(p, f"{p}{i}", i / 20) for p in "xyz" for i in (1, 2)]
        >>> rows = [{"prompt": p, "response": y, "reward": r, "source": "A"} for p, y, r in answers]
        >>> data = build_preference_dataset(rows)
        >>> data["sft"]["completion"][:], data["dpo"]["chosen"][:], data["dpo"]["rejected"][:]
        (['x2'], ['y2', 'z2'], ['y1', 'z1'])
    """
    _check_options(min_gap, max_gap, sft_fraction, pairs_per_prompt, same_source, seed, correct_key)
    read = read_responses(
        responses,
        prompt_key=prompt_key,
        response_key=response_key,
        source_key=source_key,
        score_key=score_key,
        correct_key=correct_key,
    )
    pairs = preference_pairs(read, min_gap, max_gap, every_source=pairs_per_prompt == "all", same_source=same_source)
    if sft_fraction is None:
        is_sft = pairs.outcome != Outcome.PAIR
    else:
        is_sft = sft_prompts(read.prompts, sft_fraction, seed)
    best = best_responses(read)
    best = best[is_sft[read.prompt[best]]]
    kept = ~is_sft[pairs.prompt]
    chosen, rejected = pairs.chosen[kept], pairs.rejected[kept]
    if not len(chosen) and (sft_fraction is None or not is_sft.all()):
        raise ValueError(
            _no_pair(pairs, np.full_like(is_sft, True) if sft_fraction is None else ~is_sft, min_gap, max_gap)
        )
    if not len(best) and sft_fraction:
        raise ValueError(_no_sft(read.prompts, int(is_sft.sum()), sft_fraction))
    note = _note(read, pairs, is_sft, best)
    return DatasetDict(sft=_sft_part(read, best, note), dpo=_dpo_part(read, chosen, rejected, same_source, note))


def _sft_part(read: Responses, rows: Integers, note: str) -> Dataset:
    taken = read.table.take(pa.array(rows))
    columns = {"prompt": taken["prompt"], "completion": completions(taken), "source": taken["source"]}
    return _dataset({**columns, "reward": taken["score"]}, note)


def _dpo_part(read: Responses, chosen: Integers, rejected: Integers, same_source: bool, note: str) -> Dataset:
    better, worse = read.table.take(pa.array(chosen)), read.table.take(pa.array(rejected))
    columns = {"prompt": better["prompt"], "chosen": completions(better), "rejected": completions(worse)}
    columns |= {"source": better["source"]} | ({} if same_source else {"rejected_source": worse["source"]})
    return _dataset({**columns, "chosen_reward": better["score"], "rejected_reward": worse["score"]}, note)


def completions(taken: pa.Table) -> pa.ChunkedArray:
    """The answers; strings become lists of one message where the prompts are lists of messages, as TRL wants them."""
    texts = taken["response"]
    if not pa.types.is_nested(taken["prompt"].type) or pa.types.is_nested(texts.type):
        return texts
    content = pa.concat_arrays(texts.chunks) if texts.num_chunks else pa.array([], texts.type)
    role = pa.array(["assistant"] * len(content), pa.string())
    messages = pa.StructArray.from_arrays([role, content], ["role", "content"])
    return pa.chunked_array([pa.ListArray.from_arrays(pa.array(np.arange(len(content) + 1), pa.int32()), messages)])


def _dataset(columns: dict[str, pa.ChunkedArray], note: str) -> Dataset:
    dataset = Dataset(pa.table(columns))
    dataset.info.description = note
    return dataset


def _note(read: Responses, pairs: Pairs, is_sft: Booleans, best: Integers) -> str:
    """What `fusion_report` cannot see in the rows; it travels with them as the data sets' description."""
    answered = np.zeros(read.prompts, bool)
    answered[read.prompt[best]] = True
    unanswered = int((is_sft & ~answered).sum())
    content = {
        "prompts": read.prompts,
        "sft_prompts": int(is_sft.sum()),
        "dpo_prompts": int((~is_sft).sum()),
        "sources": read.sources,
        "sft_dropped": {REASONS[Outcome.NO_CORRECT]: unanswered} if unanswered else {},
        "dpo_dropped": counted(pairs.outcome[~is_sft]),
    }
    return json.dumps({NOTE: content}, ensure_ascii=False)


def counted(outcomes: Integers) -> dict[str, int]:
    """How many prompts have no pair, by reason."""
    counts = {reason: int((outcomes == outcome).sum()) for outcome, reason in REASONS.items()}
    return {reason: count for reason, count in counts.items() if count}


def _no_pair(pairs: Pairs, asked: Booleans, min_gap: float | None, max_gap: float | None) -> str:
    """Why none of the prompts that were asked for a pair has one, and what to do."""
    counts = counted(pairs.outcome[asked])
    below, above = np.nanmax, np.nanmin
    remedies = {
        "too few answers": lambda: "sample at least two answers of each source to a prompt (num_responses)",
        "no correct answer": lambda: "sample more answers, or easier prompts",
        "no incorrect answer": lambda: "sample more answers, at a higher temperature, or harder prompts",
        "gap below min_gap": lambda: (
            f"lower min_gap, it is {min_gap} and the largest gap below it {below(pairs.largest_below[asked]):.4g}"
        ),
        "gap above max_gap": lambda: (
            f"raise max_gap, it is {max_gap} and the smallest gap above it {above(pairs.smallest_above[asked]):.4g}, or"
            " scale the rewards"
        ),
        "equal answers": lambda: "sample at a higher temperature",
    }
    reasons = ", ".join(f"{reason}: {count}" for reason, count in counts.items())
    remedy = "; ".join(remedies[reason]() for reason in counts)
    return f"no preference pair is left of {int(asked.sum())} prompts ({reasons}); {remedy}"


def _no_sft(prompts: int, drawn: int, fraction: float) -> str:
    if drawn:
        return (
            f"no SFT row is left: none of the {drawn} prompts drawn for SFT has a correct answer; sample more answers,"
            " or set sft_fraction=0"
        )
    return f"sft_fraction={fraction} of {prompts} prompts is no prompt; give more prompts, or set sft_fraction=0"


def _check_options(
    min_gap: float | None,
    max_gap: float | None,
    sft_fraction: float | None,
    pairs_per_prompt: str,
    same_source: bool,
    seed: int,
    correct_key: str | None,
) -> None:
    for name, value in (("min_gap", min_gap), ("max_gap", max_gap)):
        if value is not None and not (_is_real(value) and value >= 0):
            raise ValueError(f"{name} must be a number of at least 0, got {value!r}; None means no limit")
    if min_gap is not None and max_gap is not None and min_gap > max_gap:
        raise ValueError(f"min_gap must be at most max_gap, got {min_gap} > {max_gap}; None means no limit")
    if sft_fraction is not None and not (_is_real(sft_fraction) and 0 <= sft_fraction <= 1):
        raise ValueError(f"sft_fraction must be in [0, 1], got {sft_fraction!r}; 0.4 is the source's")
    if sft_fraction is None and correct_key is None:
        raise ValueError(
            "sft_fraction=None needs correct_key, got None: nothing else tells the prompts apart; give a fraction"
        )
    if pairs_per_prompt not in ("best", "all"):
        raise ValueError(f"pairs_per_prompt must be 'best' or 'all', got {pairs_per_prompt!r}")
    if not isinstance(same_source, bool):
        raise ValueError(f"same_source must be True or False, got {same_source!r}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed must be an integer, got {seed!r}; 0 is as good as any")


def _is_real(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
