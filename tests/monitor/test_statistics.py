"""Figures of a step, and what is kept of them between two logs."""

import pytest
import torch

from hf_stablespam.monitor.statistics import Window, global_norm, stable_spam_figures


def test_global_norm_is_that_of_one_long_vector():
    tensors = [torch.randn(3, 5), torch.randn(7), torch.randn(())]
    expected = torch.cat([t.flatten() for t in tensors]).norm()
    torch.testing.assert_close(global_norm(tensors), expected)


def test_figures_of_the_whole_model():
    names = ("grad_norm", "stable_norm", "clipped", "nonfinite", "reset")
    rows = ([3.0, 4.0, 0.0], [0.6, 0.8, 0.0], [2.0, 5.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0])
    figures = stable_spam_figures({name: torch.tensor(row) for name, row in zip(names, rows, strict=True)})
    assert {name: value.item() for name, value in figures.items()} == pytest.approx(
        {"norm": 5.0, "stable_norm": 1.0, "clipped": 7.0, "nonfinite": 1.0, "resets": 1.0}
    )


def test_window_keeps_last_mean_max_and_sum():
    window = Window()
    assert window.take() == {}
    for norm, clipped in ((1.0, 2.0), (5.0, 0.0), (3.0, 1.0)):
        window.add({"norm": torch.tensor(norm), "clipped": torch.tensor(clipped)})
    assert window.take() == {"norm": 3.0, "norm_mean": 3.0, "norm_max": 5.0, "clipped": 3.0}
    assert window.take() == {}
    window.add({"norm": torch.tensor(2.0)})
    assert window.take() == {"norm": 2.0, "norm_mean": 2.0, "norm_max": 2.0}


def test_a_nan_between_two_logs_is_not_lost():
    window = Window()
    for norm in (1.0, float("nan"), 1.0):
        window.add({"norm": torch.tensor(norm)})
    report = window.take()
    assert report["norm"] == 1.0
    assert report["norm_max"] != report["norm_max"]
