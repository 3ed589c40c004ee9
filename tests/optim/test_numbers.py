"""Floats and tensors: the same formulas, the same results."""

import math

import pytest
import torch

from hf_stablespam.optim import StableSPAM, numbers
from hf_stablespam.optim.plan import Trackers, plan_adam, plan_clipping, step_statistics

VALUES = [0.0, -0.5, 1e-300, 3.0, math.inf, math.nan]


def same(left, right):
    left, right = (float(value) for value in (left, right))
    return left == right or (math.isnan(left) and math.isnan(right))


@pytest.mark.parametrize("by", VALUES)
@pytest.mark.parametrize("value", [*VALUES, -math.inf])
def test_division_never_raises(value, by):
    assert same(numbers.divide(value, by), torch.tensor([value], dtype=torch.float64) / by)


@pytest.mark.parametrize("value", VALUES)
def test_functions_give_what_tensors_give(value):
    tensor = torch.tensor(value, dtype=torch.float64)
    assert same(numbers.at_least(value, 1.0), numbers.at_least(tensor, 1.0))
    assert same(numbers.at_most(value, 1.0), numbers.at_most(tensor, 1.0))
    assert same(numbers.isfinite(value), numbers.isfinite(tensor))
    assert same(numbers.where(value > 1, value, -1.0), numbers.where(tensor > 1, tensor, -1.0))
    assert same(numbers.sqrt(abs(value)), numbers.sqrt(tensor.abs()))
    assert same(numbers.expm1(-abs(value)), numbers.expm1(-tensor.abs()))
    assert numbers.constant(2.0, tensor).dtype == torch.float64
    assert numbers.constant(2.0, value) == 2.0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip_beta": None},
        {"norm_betas": None},
        {"reset_interval": 3},
        {"decay_steps": 4, "decay_floor": 0.0},
        {"betas": (0.0, 0.0), "norm_betas": (0.0, 0.0), "eps": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("grad_max", "norm"), [(2.0, 3.0), (0.0, 0.0), (0.1, 0.2), (math.nan, math.nan), (math.inf, math.inf)]
)
@pytest.mark.parametrize("adopted_at", [0.0, 2.0])
def test_the_plan_of_floats_is_that_of_float64_tensors(options, grad_max, norm, adopted_at):
    group = StableSPAM([torch.nn.Parameter(torch.ones(1))], **options).param_groups[0]
    floats = Trackers(2.0, 2.0, adopted_at, 0.3, 0.2, 0.05, 1.0, 0.5)
    vectors = Trackers(*(torch.tensor([value], dtype=torch.float64) for value in floats))
    found = []
    for old, largest, length in ((floats, grad_max, norm), (vectors, *torch.tensor([[grad_max], [norm]]).double())):
        clipping = plan_clipping(old, largest, group)
        plan = plan_adam(old, clipping, length, length, group)
        flat = [
            *clipping,
            *plan.trackers,
            *plan[1:],
            *step_statistics(length, largest, clipping, 0 * length, length, plan).values(),
        ]
        found.append([float(value) for value in flat])
    torch.testing.assert_close(*(torch.tensor(row) for row in found), rtol=1e-6, atol=0, equal_nan=True)
