"""Scored answers → the two data sets: the rules, against golden cases, a slow reference and their properties."""

import json
import random
import time
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_stablespam.recipes.fusechat import build_preference_dataset, fusion_report
from hf_stablespam.recipes.fusechat.selection import sft_prompts
from tests.recipes.fusechat.reference import fuse

GOLDEN = json.loads((Path(__file__).parents[2] / "data" / "fusechat_selection.json").read_text())


def row(prompt, reward, source="A", response=None, **more):
    text = f"{prompt} {source} {reward}" if response is None else response
    return {"prompt": prompt, "source": source, "response": text, "reward": reward, **more}


def build(rows, correct=False, **options):
    return build_preference_dataset(rows, correct_key="correct" if correct else None, **options)


ROWS = [row("p", 0.15), row("p", 0.1), row("q", 0.2), row("q", 0.15)]


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
@pytest.mark.parametrize("form", [list, Dataset.from_list], ids=["rows", "columns"])
def test_golden_cases(case, form):
    data = build(form(case["responses"]), **case["options"])
    for part in ("sft", "dpo"):
        assert data[part].to_list() == case["expected"][part]
    prompts = fusion_report(data)["prompts"]
    assert prompts["sft"] == len(case["expected"]["sft_prompts"])
    assert prompts["dpo"] == len(case["expected"]["dpo_prompts"])


@pytest.mark.parametrize("counts", GOLDEN["official_split_counts"], ids=lambda counts: str(counts["total"]))
def test_the_official_counts_of_the_split(counts):
    drawn = sft_prompts(counts["total"], 0.4, seed=0)
    assert (int(drawn.sum()), int((~drawn).sum())) == (counts["sft"], counts["dpo"])


# Rewards of three decimals: gaps fall on the limits and ties are frequent.
ANSWERS = st.lists(
    st.builds(
        row,
        st.sampled_from("pqrst"),
        st.integers(100, 230).map(lambda n: n / 1000),
        st.sampled_from("ABC"),
        st.sampled_from(["x", "y", "z", "w"]),
        correct=st.booleans(),
    ),
    min_size=1,
    max_size=40,
)
LIMITS = st.sampled_from([(0.01, 0.1), (None, None), (0.03, None), (None, 0.05), (0.05, 0.05)])
FRACTIONS = st.sampled_from([None, 0.0, 0.4, 0.75, 1.0])


def built_or_empty(rows, **options):
    """Both parts as lists; two empty ones where an empty part is refused."""
    try:
        data = build(rows, **options)
    except ValueError as error:
        if "is left" not in str(error) and "is no prompt" not in str(error):
            raise
        return None
    return data["sft"].to_list(), data["dpo"].to_list()


@settings(max_examples=150, deadline=None)
@given(ANSWERS, LIMITS, FRACTIONS, st.booleans(), st.sampled_from(["best", "all"]), st.integers(0, 3))
def test_equals_the_loops(rows, limits, fraction, correct, pairs_per_prompt, seed):
    correct = correct or fraction is None
    options = {"min_gap": limits[0], "max_gap": limits[1], "sft_fraction": fraction, "seed": seed}
    options |= {"pairs_per_prompt": pairs_per_prompt, "correct": correct}
    expected = fuse(rows, **options)
    built = built_or_empty(rows, **options)
    if built is None:
        assert (not expected[0] and fraction) or not expected[1]
    else:
        assert built == expected


@settings(max_examples=60, deadline=None)
@given(ANSWERS, st.integers(1, 20), st.sampled_from([0.5, 2.0, 8.0]))
def test_neither_a_shift_nor_a_scale_of_the_rewards_nor_foreign_rows_in_between_matter(rows, shift, scale):
    """Of thousandths shifted by hundredths, compared on a grid, so that rounding is no difference."""
    texts = [
        [(pair["prompt"], pair["chosen"], pair["rejected"], pair["source"]) for pair in (built or ([], []))[1]]
        for built in (
            built_or_empty(rows, sft_fraction=0.0),
            built_or_empty([{**r, "reward": r["reward"] + shift / 100} for r in rows], sft_fraction=0.0),
            built_or_empty(
                [{**r, "reward": r["reward"] * scale} for r in rows],
                sft_fraction=0.0,
                min_gap=0.01 * scale,
                max_gap=0.1 * scale,
            ),
            # Stable sort by prompt: rows of other prompts in between go, the order within a prompt stays.
            built_or_empty(
                sorted(rows, key=lambda r: [o["prompt"] for o in rows].index(r["prompt"])), sft_fraction=0.0
            ),
        )
    ]
    assert texts[0] == texts[1] == texts[2] == texts[3]


@settings(max_examples=60, deadline=None)
@given(ANSWERS, LIMITS)
def test_what_a_pair_is(rows, limits):
    built = built_or_empty(rows, min_gap=limits[0], max_gap=limits[1], sft_fraction=0.4, pairs_per_prompt="all")
    for pair in (built or ([], []))[1]:
        own = [r for r in rows if r["prompt"] == pair["prompt"] and r["source"] == pair["source"]]
        rewards = {text: [r["reward"] for r in own if r["response"] == pair[text]] for text in ("chosen", "rejected")}
        assert pair["chosen"] != pair["rejected"]
        assert pair["chosen_reward"] in [r["reward"] for r in own if r["response"] == pair["chosen"]], rewards
        assert pair["chosen_reward"] == max(r["reward"] for r in own)
        assert pair["rejected_reward"] == min(r["reward"] for r in own)
        gap = pair["chosen_reward"] - pair["rejected_reward"]
        assert (limits[0] or 0) - 1e-9 <= gap <= (limits[1] or 1) + 1e-9
    if built:
        assert not {r["prompt"] for r in built[0]} & {r["prompt"] for r in built[1]}


def test_the_order_of_sources_only_decides_ties():
    rows = [row("p", reward, source) for source in "ABC" for reward in (0.1, 0.15, 0.17)]
    distinct = [{**r, "reward": r["reward"] + "ABC".index(r["source"]) / 1000} for r in rows]
    for seed in range(5):
        mixed = random.Random(seed).sample(distinct, len(distinct))
        assert build(mixed, sft_fraction=0.0)["dpo"].to_list() == build(distinct, sft_fraction=0.0)["dpo"].to_list()


def test_messages_keep_their_form_and_answers_take_it():
    def chat(text):
        return [{"role": "system", "content": "Be short."}, {"role": "user", "content": text}]

    rows = [{**r, "prompt": chat(r["prompt"])} for r in ROWS]
    data = build(rows, sft_fraction=0.5)
    plain = build(ROWS, sft_fraction=0.5)
    assert data["sft"]["prompt"][:] == [chat(text) for text in plain["sft"]["prompt"][:]]
    for part, column in (("sft", "completion"), ("dpo", "chosen"), ("dpo", "rejected")):
        assert data[part][column][:] == [[{"role": "assistant", "content": t}] for t in plain[part][column][:]]
    as_messages = [{**r, "response": [{"role": "assistant", "content": r["response"]}]} for r in rows]
    assert build(as_messages, sft_fraction=0.5)["dpo"].to_list() == data["dpo"].to_list()
    with pytest.raises(ValueError, match="'response' holds chat messages and 'prompt' strings"):
        build([{**r, "response": [{"role": "assistant", "content": "x"}]} for r in ROWS])


def test_a_selected_and_shuffled_dataset_and_other_column_names():
    rows = Dataset.from_list([*ROWS, row("r", 0.3), row("r", 0.25)]).select([1, 0, 3, 2])
    renamed = rows.rename_columns({"prompt": "x", "response": "y", "source": "model", "reward": "r"})
    keys = {"prompt_key": "x", "response_key": "y", "source_key": "model", "score_key": "r"}
    data = build(renamed, sft_fraction=0.0, **keys)
    assert data["dpo"].to_list() == fuse(rows.to_list(), sft_fraction=0.0)[1]
    assert len(data["dpo"]) == 2


def test_answers_of_different_sources_are_paired_if_asked_for():
    rows = [row("p", 0.2, "A"), row("p", 0.15, "B")]
    (pair,) = build(rows, sft_fraction=0.0, same_source=False)["dpo"].to_list()
    assert (pair["source"], pair["rejected_source"]) == ("A", "B")
    with pytest.raises(ValueError, match=r"of 1 prompts \(too few answers: 1\); sample at least two answers"):
        build(rows, sft_fraction=0.0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"min_gap": 0.2}, ValueError, "min_gap must be at most max_gap, got 0.2 > 0.1"),
        ({"min_gap": -0.1}, ValueError, "min_gap must be a number of at least 0, got -0.1"),
        ({"max_gap": float("nan")}, ValueError, "max_gap must be a number of at least 0, got nan"),
        ({"sft_fraction": 1.5}, ValueError, r"sft_fraction must be in \[0, 1\], got 1.5"),
        ({"sft_fraction": None}, ValueError, "sft_fraction=None needs correct_key, got None"),
        ({"pairs_per_prompt": "every"}, ValueError, "must be 'best' or 'all', got 'every'"),
        ({"seed": 0.5}, ValueError, "seed must be an integer, got 0.5"),
        ({"score_key": "rewards"}, ValueError, r"column 'rewards' \(did you mean 'reward'\?\)"),
        ({"correct_key": "reward"}, TypeError, "'reward' must be True or False in every row, row 0 has 0.15"),
        ({"sft_fraction": 0.1}, ValueError, "sft_fraction=0.1 of 2 prompts is no prompt"),
        ({"sft_fraction": 0.0, "min_gap": 0.06}, ValueError, "below min_gap: 2.*lower min_gap, it is 0.06.*0.05"),
        ({"sft_fraction": 0.0, "max_gap": 0.04}, ValueError, "above max_gap: 2.*raise max_gap, it is 0.04.*0.05"),
    ],
)
@pytest.mark.parametrize("form", [list, Dataset.from_list], ids=["rows", "columns"])
def test_wrong_options(options, error, message, form):
    with pytest.raises(error, match=message):
        build_preference_dataset(form(ROWS), **{"sft_fraction": 0.5, **options})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"reward": float("nan")}, ValueError, "'reward' must be a finite number in every row, row 1 has nan"),
        ({"reward": float("inf")}, ValueError, "row 1 has inf"),
        ({"reward": None}, ValueError, "row 1 has None"),
        ({"reward": "good"}, ValueError, "row 1 has 'good'"),
        ({"reward": True}, ValueError, "row 1 has True"),
        ({"prompt": None}, ValueError, "'prompt' must have a value in every row, row 1 has none"),
        ({"response": None}, ValueError, "'response' must have a value in every row, row 1"),
        ({"correct": None}, TypeError, "'correct' must be True or False in every row, row 1 has None"),
        ({"correct": 1}, TypeError, "row 1 has 1"),
        ({"prompt": [{"role": "user", "content": "x"}]}, ValueError, "'prompt' must have values of one kind"),
    ],
)
def test_wrong_rows(change, error, message):
    rows = [{**r, "correct": True} for r in ROWS]
    rows[1] |= change
    with pytest.raises(error, match=message):
        build(rows, correct="correct" in change, sft_fraction=0.5)


@pytest.mark.parametrize("value", [datetime(2024, 1, 5), 5, {"role": "user", "content": "x"}, ["x"], [{"text": "x"}]])
@pytest.mark.parametrize("name", ["prompt", "response"])
def test_texts_that_are_none(name, value):
    with pytest.raises(ValueError, match=f"'{name}' must be a string or a list of chat messages .* row 0 has"):
        build([{**r, name: value} for r in ROWS])


def test_a_wrong_score_among_numbers_of_numpy_is_the_one_that_is_named():
    scores = [np.float32(0.1), np.float32(0.2), "bad"]
    with pytest.raises(ValueError, match="row 2 has 'bad'"):
        build([row("p", score, response=str(score)) for score in scores])


@pytest.mark.parametrize("scores", [[1, 2**70], [0.5, 2**60 + 1], [np.float32(1), 2**70]])
def test_large_integers_are_scores(scores):
    data = build([row("p", score) for score in scores], sft_fraction=0.0, max_gap=None)
    assert data["dpo"]["chosen_reward"][:] == [float(scores[1])]


def test_an_integer_without_a_float_is_no_score():
    with pytest.raises(ValueError, match="'reward' must be a finite number in every row, row 1 has inf"):
        build([row("p", 1, response="x"), row("p", 10**400, response="y")])


def test_wrong_inputs():
    with pytest.raises(ValueError, match="at least one row, got none"):
        build([])
    with pytest.raises(TypeError, match="must be a Dataset or a list of mappings, got str"):
        build("rows")
    with pytest.raises(TypeError, match="must be mappings with the columns as keys, row 4 is 5"):
        build([*ROWS, 5])
    with pytest.raises(ValueError, match=r"row 2 of responses must have a column 'response' \(did you mean 'respons'"):
        build([ROWS[0], ROWS[1], {"prompt": "p", "source": "A", "respons": "x", "reward": 1.0}])
    with pytest.raises(ValueError, match="no SFT row is left: none of the 2 prompts drawn"):
        build([{**r, "correct": False} for r in ROWS], correct=True, sft_fraction=1.0)
    with pytest.raises(ValueError, match=r"no incorrect answer: 2\); sample more answers, at a higher temperature"):
        build([{**r, "correct": True} for r in ROWS], correct=True, sft_fraction=None)
    with pytest.raises(ValueError, match=r"too few answers: 2\)"):
        build([ROWS[0], ROWS[2]], sft_fraction=0.0)


def test_prompts_that_differ_in_whitespace_are_mentioned_once():
    rows = [row(text, reward) for text in ("a b", "a b ", "a  b", "c") for reward in (0.15, 0.1)]
    with pytest.warns(UserWarning, match="2 prompts differ from another only in whitespace") as seen:
        data = build(rows, sft_fraction=0.0)
    assert len(seen) == 1
    assert len(data["dpo"]) == 4
    assert Path(seen[0].filename).name == "test_preferences.py"


def test_the_report_counts_shares_gaps_and_what_was_dropped(tmp_path):
    rows = [row("p", 0.2, "A"), row("p", 0.15, "A"), row("p", 0.3, "B"), row("q", 0.2, "B"), row("q", 0.1, "B")]
    rows += [row("r", 0.5, "A"), row("r", 0.1, "A"), row("s", 0.1, "A"), row("t", 0.1, "C"), row("t", 0.1, "C")]
    data = build(rows, sft_fraction=0.0)
    report = fusion_report(data)
    assert report["prompts"] == {"total": 5, "sft": 0, "dpo": 5}
    assert report["dropped"]["dpo"] == {"too few answers": 1, "gap below min_gap": 1, "gap above max_gap": 1}
    assert report["sources"]["A"] == {
        "sft_rows": 0,
        "sft_share": 0.0,
        "pairs": 1,
        "pair_share": 0.5,
        "mean_gap": pytest.approx(0.05),
    }
    assert report["sources"]["C"]["pairs"] == 0
    data.save_to_disk(tmp_path / "data", num_shards={"sft": 1, "dpo": 1})
    assert fusion_report(load_from_disk(tmp_path / "data")) == report
    bare = {part: Dataset.from_list(data[part].to_list()) for part in data if len(data[part])}
    with pytest.raises(ValueError, match="must have a part 'sft'"):
        fusion_report(bare)
    lost = fusion_report({"sft": Dataset.from_dict({"source": ["A"]}), "dpo": bare["dpo"]})
    assert lost["dropped"] is None
    assert lost["sources"]["A"]["sft_share"] == 1.0


def test_sources_that_are_numbers_are_counted_like_others():
    """A `ClassLabel` column holds integers."""
    named = [row("p", 0.2, "0"), row("p", 0.15, "0"), row("q", 0.3, "1"), row("q", 0.25, "1")]
    labels = ClassLabel(names=["llama", "qwen"])
    numbered = Dataset.from_list([{**r, "source": int(r["source"])} for r in named]).cast_column("source", labels)
    expected = fusion_report(build(named, sft_fraction=0.5))
    assert fusion_report(build(numbered, sft_fraction=0.5)) == expected
    assert sum(source["pairs"] for source in expected["sources"].values()) == 1


def test_a_hundred_thousand_rows_take_less_than_five_seconds():
    rewards = random.Random(0)
    prompts = [f"prompt {i // 25} " * 20 for i in range(100_000)]
    columns = {"prompt": prompts, "response": [f"answer {i} " * 50 for i in range(100_000)]}
    columns |= {"source": ["ABCDE"[i // 5 % 5] for i in range(100_000)]}
    rows = Dataset.from_dict({**columns, "reward": [rewards.gauss(0.15, 0.03) for _ in range(100_000)]})
    start = time.process_time()
    data = build(rows)
    seconds = time.process_time() - start
    assert seconds < 5
    assert len(data["sft"]) == 1600
