"""Spike scores, against their definitions written out in Python."""

import math

import pytest
import torch

from hf_stablespam.monitor.spikes import EntryScores, TensorScores


def scores_of(values):
    tracker = TensorScores(1, torch.device("cpu"))
    return [tracker.update(torch.tensor([value])).score.item() for value in values]


def test_score_is_a_multiple_of_the_running_mean():
    values = torch.rand(40).tolist()
    weights = [0.99 ** (39 - i) for i in range(1, 40)]
    mean = sum(w * v for w, v in zip(weights, values[:-1], strict=True)) / sum(weights)
    assert scores_of(values)[-1] == pytest.approx(values[-1] / mean, rel=1e-4)


def test_the_first_five_gradients_have_no_score():
    assert scores_of([1.0, 1.0, 1.0, 1.0, 900.0, 1.0])[:5] == [0.0] * 5


def test_one_spike_does_not_hide_the_next():
    first, *usual, second = scores_of([1.0] * 100 + [1e6] + [1.0] * 5 + [100.0])[100:]
    assert first == pytest.approx(1e6, rel=1e-3)
    assert max(usual) < 1
    assert 50 < second < 100


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_zero_and_nonfinite_gradients_leave_no_trace(value):
    assert scores_of([1.0] * 3 + [value] * 10 + [1.0] * 3)[:15] == [0.0] * 15
    assert scores_of([2.0] * 9 + [value, 6.0])[-2:] == pytest.approx([0.0, 3.0])


def test_tensors_are_scored_on_their_own():
    tracker = TensorScores(2, torch.device("cpu"))
    for _ in range(10):
        tracker.update(torch.tensor([1.0, 1000.0]))
    found = tracker.update(torch.tensor([20.0, 1000.0]))
    assert found.score.tolist() == pytest.approx([20.0, 1.0], rel=1e-4)
    assert found.usual.tolist() == pytest.approx([1.0, 1000.0], rel=1e-4)


def test_entries_are_compared_with_their_own_mean():
    """SPAM's score: |g_i| over the mean of |g_i| over all steps, this one included."""
    grads = torch.randn(30, 3, 4)
    grads[-1, 1, 2] = 500.0
    tracker = EntryScores([torch.zeros(3, 4)])
    for step, grad in enumerate(grads):
        (score,) = tracker.update([grad], torch.tensor([True]))
        expected = (grad.abs() / grads[: step + 1].abs().mean(0)).max()
        torch.testing.assert_close(score, expected, rtol=1e-4, atol=0)
    assert score > 20


def test_a_nonfinite_gradient_enters_no_mean_of_entries():
    tracker = EntryScores([torch.zeros(2), torch.zeros(2)])
    ones = torch.ones(2)
    tracker.update([ones, ones], torch.tensor([True, True]))
    scores = tracker.update([torch.tensor([math.nan, 3.0]), 3 * ones], torch.tensor([False, True]))
    assert torch.stack(scores).tolist() == [0.0, 1.5]
    assert torch.stack(tracker.update([ones, ones], torch.tensor([True, True]))).tolist() == pytest.approx([1.0, 0.6])


def test_an_entry_that_never_had_a_gradient_scores_nothing():
    tracker = EntryScores([torch.zeros(2), torch.zeros(0)])
    scores = tracker.update([torch.zeros(2), torch.zeros(0)], torch.tensor([True, True]))
    assert torch.stack(scores).tolist() == [0.0, 0.0]


def test_other_tensors_go_on_with_the_means_of_their_places():
    of_tensors = TensorScores(2, torch.device("cpu"))
    of_entries = EntryScores([torch.zeros(2), torch.zeros(3)])
    for _ in range(6):
        of_tensors.update(torch.tensor([1.0, 2.0]))
        of_entries.update([torch.full((2,), 1.0), torch.full((3,), 2.0)], torch.tensor([True, True]))
    of_tensors.follow([1, None, 0])
    of_entries.follow([torch.zeros(3), torch.zeros(1), torch.zeros(2)], [1, None, 0])
    found = of_tensors.update(torch.tensor([2.0, 5.0, 1.0]))
    assert found.usual.tolist() == pytest.approx([2, 0, 1])
    assert found.score.tolist() == pytest.approx([1, 0, 1])
    scores = of_entries.update([torch.full((n,), 8.0) for n in (3, 1, 2)], torch.tensor([True] * 3))
    assert [score.item() for score in scores] == pytest.approx([8 / (20 / 7), 1, 4])


def test_steps_without_a_gradient_enter_no_mean_of_entries():
    tracker, absent = EntryScores([torch.zeros(3)]), torch.zeros(0)
    for _ in range(60):
        assert tracker.update([absent], torch.tensor([True]))[0] == 0
    assert tracker.update([torch.ones(3)], torch.tensor([True]))[0] == 1
    assert tracker.update([torch.full((3,), 3.0)], torch.tensor([True]))[0] == 1.5
