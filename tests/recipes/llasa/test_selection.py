"""The rules of the search against the golden selections, without a model."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_stablespam.recipes.llasa import select_beams
from hf_stablespam.recipes.llasa.selection import Candidate, beam_search, choose, scored
from tests.recipes.llasa.helpers import golden

GOLDEN = golden("search")


@pytest.mark.parametrize("case", GOLDEN["best_of_n"], ids=lambda case: case["name"])
def test_the_best_is_the_golden_one(case):
    assert choose(case["scores"], case["finished"], case["lengths"]) == case["chosen"]


@pytest.mark.parametrize("case", GOLDEN["select_beams"], ids=lambda case: case["name"])
def test_beams_are_the_golden_ones(case):
    selected = select_beams(case["scores"], case["finished"], case["beam_width"])
    assert selected == (case["kept"], case["live"], case["complete"])


@pytest.mark.parametrize("case", GOLDEN["process_search"], ids=lambda case: f"seed {case['seed']}")
def test_a_whole_search_is_the_golden_one(case):
    script = iter(case["steps"])
    answers = {}

    def extend(live, continuations, length):
        step = next(script)
        assert continuations == step["candidates_per_beam"]
        for candidate in step["candidates"]:
            answers[tuple(candidate["codes"])] = candidate["score"]
        return [
            Candidate([*live[c["parent"]].codes, *c["appended"]], c["finished"], parent=c["parent"])
            for c in step["candidates"]
        ]

    live, complete, steps = beam_search(
        extend,
        lambda codes: [answers[tuple(c)] for c in codes],
        Candidate(case["start"], finished=False),
        beam_width=case["beam_width"],
        expansions=case["expansions"],
        chunk_size=2,
        num_codes=10,
    )
    assert next(script, None) is None
    for step, expected in zip(steps, case["steps"], strict=True):
        assert step.kept == expected["kept"]
        assert [c.codes for c in step.candidates] == [c["codes"] for c in expected["candidates"]]
        assert [i for i in step.kept if step.candidates[i].finished] == expected["complete"]
    assert [c.codes for c in complete] == case["complete"]
    everything = [*complete, *live]
    winner = choose([c.score for c in everything], [c.finished for c in everything], [len(c.codes) for c in everything])
    assert everything[winner].codes == case["result"]
    assert (everything[winner].score, everything[winner].finished) == (case["result_score"], case["result_finished"])


@given(st.lists(st.tuples(st.floats(-5, 5), st.booleans(), st.integers(0, 3)), min_size=1, max_size=20))
def test_more_candidates_never_score_less_and_cut_ones_never_beat_finished_ones(candidates):
    scores, finished, lengths = (list(column) for column in zip(*candidates, strict=True))
    best = -math.inf
    for n in range(1, len(candidates) + 1):
        chosen = choose(scores[:n], finished[:n], lengths[:n])
        if chosen is None:
            assert not any(lengths[:n])
            continue
        assert lengths[chosen] > 0
        if any(f and length for f, length in zip(finished[:n], lengths[:n], strict=True)):
            assert finished[chosen]
        if all(finished):
            assert scores[chosen] >= best
            best = scores[chosen]


def test_empty_candidates_are_not_shown_to_the_verifier():
    shown = []

    def verifier(codes):
        shown.extend(codes)
        return [1.0] * len(codes)

    candidates = scored([Candidate([], True), Candidate([4], True)], verifier)
    assert shown == [[4]]
    assert [c.score for c in candidates] == [-math.inf, 1.0]


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_names_the_candidate(score):
    with pytest.raises(ValueError, match=r"finite, got -?(nan|inf) for candidate 1 of 2, which has 1 codes: \[4\]"):
        scored([Candidate([3], True), Candidate([4], True)], lambda codes: [0.0, score])


def test_another_number_of_scores_is_refused():
    with pytest.raises(ValueError, match="one score for each candidate: 1 for 2"):
        scored([Candidate([3], True), Candidate([4], True)], lambda codes: [0.0])


def test_wrong_widths_are_refused():
    with pytest.raises(ValueError, match="width must be an integer of at least 1, got 0"):
        select_beams([1.0], [True], 0)
    with pytest.raises(ValueError, match="finished must have one entry for each of the 2 scores, got 1"):
        select_beams([1.0, 2.0], [True], 1)
