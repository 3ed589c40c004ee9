"""What the two FuseChat studies count and how they show it; their runs take minutes."""

import pytest

from benchmarks import fusechat_smollm2, fusechat_toy
from hf_stablespam.recipes.fusechat import score_responses
from tests.recipes.fusechat.helpers import scored_rows


def test_sums_are_read_from_questions_and_answers():
    prompt = [fusechat_smollm2.question(17, 25)]
    assert fusechat_smollm2.is_correct(prompt, "17 + 25 = 42.")
    assert not fusechat_smollm2.is_correct(prompt, "The answer is 43")
    assert not fusechat_smollm2.is_correct(prompt, "forty-two")
    assert fusechat_smollm2.rewards([prompt] * 3, ["42", "43", "It is 42"]) == pytest.approx([0.149, 0.049, 0.096])
    asked = fusechat_smollm2.with_examples(prompt)
    assert asked[-1] == prompt[0]
    for question, answer in zip(asked[:-1:2], asked[1:-1:2], strict=True):
        assert fusechat_smollm2.is_correct([question], answer["content"])


def test_random_answers_are_answers_to_their_prompts_and_often_not_the_best():
    rows = [{k: v for k, v in row.items() if k != "reward"} for row in scored_rows()]
    scored = score_responses(rows, lambda prompts, answers: [ord(answer[0]) / 500 for answer in answers])
    data = fusechat_toy.random_answers(scored, seed=0)
    best = fusechat_toy.build_preference_dataset(scored)["sft"]
    answers = {(row["prompt"], row["response"]) for row in rows}
    assert set(zip(data["sft"]["prompt"][:], data["sft"]["completion"][:], strict=True)) <= answers
    assert data["sft"]["completion"][:] != best["completion"][:]
    assert (data["sft"]["prompt"][:], len(data["dpo"])) == (best["prompt"][:], 0)


def test_the_table_has_a_line_for_each_way_on_record():
    row = {"training": "AdamW", "stage": "sft", "seed": "0", "reward_percent": "90.0", "malformed_percent": "1.5"}
    shown = fusechat_toy.table([row, {**row, "seed": "1", "reward_percent": "80.0"}]).splitlines()
    assert shown[2:] == ["| AdamW | SFT | 90.0 / 80.0 | 85.0 | 1.5 / 1.5 |"]
    assert len(fusechat_toy.table(fusechat_toy.record()).splitlines()) == 2 + len(fusechat_toy.ROWS)
