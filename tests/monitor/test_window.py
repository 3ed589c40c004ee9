"""Figures of steps, and what is kept of them between two logs."""

import math

import pytest
import torch

from hf_stablespam.monitor.figures import Parts
from hf_stablespam.monitor.window import Window, global_norm

NAMES = ["layers.0.up.weight", "layers.0.up.bias", "head.weight"]
ENTRIES = [6, 2, 4]


def window(by=None):
    return Window(Parts(NAMES, ENTRIES, by, torch.device("cpu")))


def test_global_norm_is_that_of_one_long_vector():
    tensors = [torch.randn(3, 5), torch.randn(7), torch.randn(())]
    expected = torch.cat([t.flatten() for t in tensors]).norm()
    torch.testing.assert_close(global_norm(tensors), expected)


def test_last_mean_max_sum_and_share():
    one = window()
    assert one.take() == ({}, [])
    for norm, clipped in ((1.0, 2.0), (5.0, 0.0), (3.0, 1.0)):
        one.add({"norm": torch.tensor([norm, 0.0, 0.0]), "clipped": torch.tensor([0.0, clipped, 0.0])})
    expected = {"norm": 3.0, "norm_mean": 3.0, "norm_max": 5.0, "clipped": 3.0, "clipped_share": 3 / (3 * 12)}
    assert one.take() == (pytest.approx(expected), [])
    assert one.take() == ({}, [])
    one.add({"norm": torch.tensor([2.0, 0.0, 0.0])})
    assert one.take()[0] == {"norm": 2.0, "norm_mean": 2.0, "norm_max": 2.0}


def test_other_numbers_travel_along():
    one = window()
    extra = torch.tensor([7.0, 8.0])
    assert one.take(extra) == ({}, [7.0, 8.0])
    one.add({"weight_norm": torch.tensor([3.0, 4.0, 0.0])})
    assert one.take(extra) == ({"weight_norm": 5.0}, [7.0, 8.0])
    one.add({"weight_norm": torch.tensor([3.0, 4.0, 0.0])})
    assert one.take(torch.empty(0)) == ({"weight_norm": 5.0}, [])


@pytest.mark.parametrize(
    ("figure", "key", "values", "whole", "parts"),
    [
        ("norm", "norm", [3.0, 4.0, 12.0], 13.0, [5.0, 12.0]),
        ("largest", "largest_max", [3.0, 4.0, 2.0], 4.0, [4.0, 2.0]),
        ("nonfinite", "nonfinite", [1.0, 1.0, 0.0], 2.0, [2.0, 0.0]),
        ("norm_factor", "norm_factor", [2.0, 0.0, 6.0], 4.0, [2.0, 6.0]),
        ("clipped", "clipped_share", [1.0, 3.0, 2.0], 0.5, [0.5, 0.5]),
    ],
)
def test_tensors_of_a_block_combine(figure, key, values, whole, parts):
    one = window("block")
    one.add({figure: torch.tensor(values)})
    report = one.take()[0]
    assert [report[f"{key}{part}"] for part in ("", "/layers.0", "/head")] == pytest.approx([whole, *parts])


def test_every_tensor_by_its_name():
    one = window("tensor")
    one.add({"norm": torch.tensor([3.0, 4.0, 12.0])})
    report = one.take()[0]
    assert [report[f"norm/{name}"] for name in NAMES] == [3.0, 4.0, 12.0]
    assert [report[f"norm_max/{name}"] for name in NAMES] == [3.0, 4.0, 12.0]


def test_resets_are_of_the_whole_optimizer():
    one = window("tensor")
    for value in (1.0, 0.0, 1.0):
        one.add({"resets": torch.full((3,), value)})
    assert one.take()[0] == {"resets": 2.0}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_left_out_and_hides_nothing(value):
    one = window("block")
    for norm in (1.0, value, 5.0):
        one.add({"norm": torch.tensor([norm, 0.0, 2.0])})
    report = one.take()[0]
    assert report["norm_mean/layers.0"] == 3.0
    assert report["norm_max/layers.0"] == 5.0
    assert report["norm_mean/head"] == 2.0
    one.add({"norm": torch.tensor([value, 0.0, 2.0])})
    report = one.take()[0]
    assert not {"norm", "norm_mean", "norm_max", "norm/layers.0"} & report.keys()
    assert report["norm/head"] == 2.0


def test_ratio_of_update_and_weight():
    one = window()
    for update in (1.0, 2.0):
        one.add({"weight_norm": torch.tensor([3.0, 4.0, 0.0]), "update_norm": torch.tensor([0.0, update, 0.0])})
    report = one.take()[0]
    assert (report["update_ratio"], report["update_ratio_mean"]) == pytest.approx((0.4, 0.3))


def test_shares_are_of_the_entries_that_each_step_had():
    """Before a cut and after it, through a checkpoint of either kind; other parts begin anew."""
    whole = window("block")
    whole.add({"clipped": torch.tensor([1.0, 1.0, 2.0])})
    resumed, older = window("block"), window("block")
    resumed.restore(whole.knowledge(), torch.device("cpu"))
    kept = {name: value for name, value in whole.knowledge().items() if name != "entries"}
    older.restore({**kept, "steps": 1}, torch.device("cpu"))
    for one in (whole, resumed, older):
        one.follow(Parts(NAMES, [3, 1, 4], "block", torch.device("cpu")))
        one.add({"clipped": torch.tensor([1.0, 0.0, 0.0])})
    found = whole.take()[0]
    assert found["clipped_share"] == pytest.approx(5 / 20)
    assert found["clipped_share/layers.0"] == pytest.approx(3 / 12)
    assert resumed.take()[0] == older.take()[0] == found
    whole.add({"clipped": torch.tensor([1.0, 0.0, 0.0])})
    whole.follow(Parts(["other.weight"], [2], "block", torch.device("cpu")))
    assert whole.take()[0] == {}


@pytest.mark.parametrize("others", [NAMES[:1], [*NAMES, "new.weight", "other.weight"]], ids=["fewer", "more"])
@pytest.mark.parametrize("by", ["block", "tensor"])
def test_another_number_of_parts_begins_anew(by, others):
    """Parameters were frozen, or unfrozen, between two logs."""
    one = window(by)
    one.add({"clipped": torch.tensor([3.0, 0.0, 0.0])})
    one.follow(Parts(others, [5] * len(others), by, torch.device("cpu")))
    assert one.take() == ({}, [])
    one.follow(Parts(NAMES, ENTRIES, by, torch.device("cpu")))
    one.add({"clipped": torch.tensor([0.0, 0.0, 2.0])})
    resumed = window(by)
    resumed.restore(one.knowledge(), torch.device("cpu"))
    assert one.knowledge()["entries"][0] == sum(ENTRIES)
    found = one.take()[0]
    assert found["clipped_share"] == pytest.approx(2 / 12)
    assert resumed.take()[0] == found
