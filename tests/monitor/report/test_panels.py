import math
from pathlib import Path

import numpy as np
import pytest

from hf_stablespam.monitor.report import panels as report_panels
from hf_stablespam.monitor.report.runs import Run

from .report_data import log_rows


def run(rows=None, label="run", **options):
    return Run(label, Path("x"), log_rows(**{"steps": 120} | options) if rows is None else rows)


def panel(runs, key, points=1000):
    return next((found for found in report_panels.panels(runs, points) if found.key == key), None)


def test_a_run_without_our_callback_shows_what_it_has():
    keys = [found.key for found in report_panels.panels([run(ours=False)], 1000)]
    assert keys == ["loss", "perplexity", "gradient_norm", "learning_rate"]


def test_a_run_with_our_callback_shows_the_rest():
    keys = [found.key for found in report_panels.panels([run()], 1000)]
    assert keys == ["loss", "perplexity", "gradient_norm", "clipped", "learning_rate"]


def test_the_training_loss_stands_behind_the_validation_loss():
    names = {
        (curve.run, curve.name, curve.faint) for curve in panel([run(), run([{"step": 1, "loss": 2.0}])], "loss").curves
    }
    assert names == {(0, "training", True), (0, "validation", False), (1, "training", False)}


def test_perplexity_is_the_exponential_and_has_a_gap_where_it_is_infinite():
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1e4}, {"step": 3, "loss": math.nan}]
    values = panel([run(rows)], "perplexity").curves[0].values
    assert values[0] == pytest.approx(math.exp(2.0), rel=1e-6)
    assert np.isnan(values[1:]).all()


def test_spikes_and_resets_are_marked_on_the_curve():
    spikes = [{"step": 50, "tensor": "up", "score": 12.5}, {"step": 50, "tensor": "down", "score": None}]
    spiked = Run("run", Path("x"), log_rows(100), spikes)
    found = panel([spiked], "gradient_norm")
    marks = {mark.name: mark for mark in found.marks}
    steps, norms = spiked.series("gradients/norm_max")
    assert list(marks["spike"].steps) == [50]
    assert marks["spike"].texts == ["down, up ×12.5"]
    assert marks["spike"].values[0] == pytest.approx(norms[steps.index(50)], rel=1e-6)
    assert list(marks["reset"].steps) == [100]
    assert "▲ spike" in found.note
    assert "Faint: after stabilising" in found.note


@pytest.mark.parametrize("key", ["gradients/resets", "momentum/resets"])
def test_resets_have_two_owners(key):
    rows = [{"step": step, "grad_norm": 1.0, key: float(step == 2)} for step in (1, 2, 3)]
    (marks,) = panel([run(rows)], "gradient_norm").marks
    assert (marks.name, list(marks.steps)) == ("reset", [2])


def test_the_clipped_share_is_shown_where_it_is_known():
    assert panel([run()], "clipped").unit == "entries since the last log"
    assert panel([run([{"step": 1, "gradients/clipped_share": 0.1}])], "clipped").unit == "share of all entries"


def test_thinning_keeps_every_extreme_and_both_ends():
    values = np.random.default_rng(0).normal(size=20_000)
    values[12_345], values[777] = 1000.0, -1000.0
    steps, thin = report_panels.thinned(list(range(20_000)), list(values), 500)
    assert 200 < len(thin) <= 502
    assert thin.max() == 1000.0
    assert thin.min() == -1000.0
    assert steps[0] == 0
    assert steps[-1] == 19_999
    assert np.array_equal(thin, values[steps.astype(int)].astype(np.float32))


def test_thinning_keeps_gaps_and_numbers_beside_them():
    values = [1.0] * 100 + [math.nan] * 100 + [math.inf] + [2.0] * 99
    _, thin = report_panels.thinned(list(range(300)), values, 30)
    assert np.isnan(thin).any()
    assert set(thin[np.isfinite(thin)]) == {1.0, 2.0}


def test_a_short_curve_is_left_as_it_is():
    steps, values = report_panels.thinned([1, 2, 3], [3.0, 1.0, 2.0], 3)
    assert list(steps) == [1, 2, 3]
    assert list(values) == [3.0, 1.0, 2.0]


def test_a_heat_map_keeps_the_largest_norm_of_each_column():
    (found,) = report_panels.heat_maps([run(steps=100, blocks=3)], cells=30)
    assert found.blocks == ["model.layers.0", "model.layers.1", "model.layers.2"]
    assert found.norms.shape == (3, 10)
    largest = [
        max(row[f"gradients/norm/{name}"] for row in log_rows(100, blocks=3) if "loss" in row) for name in found.blocks
    ]
    assert found.norms.max(axis=1) == pytest.approx(largest)


def test_a_block_without_a_norm_leaves_a_gap_in_the_heat_map():
    rows = [{"step": 1, "gradients/norm/a": 1.0}, {"step": 2, "gradients/norm/a": 2.0, "gradients/norm/b": 3.0}]
    (found,) = report_panels.heat_maps([run(rows)], cells=100)
    assert found.norms[0].tolist() == [1.0, 2.0]
    assert np.isnan(found.norms[1, 0])
    assert found.norms[1, 1] == 3.0


def test_a_heat_map_prefers_the_largest_since_the_last_log():
    rows = [{"step": 1, "gradients/norm/a": 1.0, "gradients/norm_max/a": 7.0}]
    (found,) = report_panels.heat_maps([run(rows)], cells=100)
    assert found.blocks == ["a"]
    assert found.norms.tolist() == [[7.0]]


def test_no_heat_map_without_blocks():
    assert report_panels.heat_maps([run()], cells=100) == []
