"""The rules of FuseChat-3.0 one prompt at a time, in loops: slow and readable."""

import math
import random


def fuse(rows, *, correct=False, min_gap=0.01, max_gap=0.1, sft_fraction=0.4, pairs_per_prompt="best", seed=0):
    """What `build_preference_dataset` must give, as two lists of rows."""
    answers = {}
    for row in rows:
        answers.setdefault(row["prompt"], []).append(row)
    pairs = {prompt: pairs_of(own, correct, min_gap, max_gap, pairs_per_prompt) for prompt, own in answers.items()}
    prompts = list(answers)
    if sft_fraction is None:
        drawn = {prompt for prompt in prompts if not pairs[prompt]}
    else:
        order = list(prompts)
        random.Random(seed).shuffle(order)
        drawn = set(order[: math.floor(sft_fraction * len(prompts) + 1e-9)])
    sft, dpo = [], []
    for prompt in prompts:
        if prompt not in drawn:
            dpo += pairs[prompt]
            continue
        right = [row for row in answers[prompt] if not correct or row["correct"]]
        if right:
            top = max(right, key=lambda row: row["reward"])  # max keeps the first of several
            sft.append(
                {"prompt": prompt, "completion": top["response"], "source": top["source"], "reward": top["reward"]}
            )
    return sft, dpo


def pairs_of(answers, correct, min_gap, max_gap, pairs_per_prompt):
    sources = {}
    for row in answers:
        sources.setdefault(row["source"], []).append(row)
    found = []
    for source, own in sources.items():
        right = [row for row in own if not correct or row["correct"]]
        wrong = [row for row in own if not correct or not row["correct"]]
        if len(own) < 2 or not right or not wrong:
            continue
        top = max(right, key=lambda row: row["reward"])
        worst = min(wrong, key=lambda row: row["reward"])
        gap = top["reward"] - worst["reward"]
        too_small = min_gap is not None and gap < min_gap - 1e-9
        too_large = max_gap is not None and gap > max_gap + 1e-9
        if too_small or too_large or top["response"] == worst["response"]:
            continue
        pair = {"prompt": answers[0]["prompt"], "chosen": top["response"], "rejected": worst["response"]}
        pair |= {"source": source, "chosen_reward": top["reward"], "rejected_reward": worst["reward"]}
        found.append(pair)
    if pairs_per_prompt == "best" and found:
        found = [max(found, key=lambda pair: (pair["chosen_reward"], -pair["rejected_reward"]))]
    return found
