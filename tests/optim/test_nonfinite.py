"""A gradient that is not finite touches nothing of its tensor; extremes of float32 do no harm."""

import math

import pytest
import torch

from hf_stablespam.optim import StableSPAM
from tests.optim.common import PATHS, assert_identical, gradients, parameters, snapshot, train

SHAPES = [(17, 9), (6,), ()]
paths = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


def spoil(grad, value):
    grad = grad.clone()
    grad.view(-1)[-1] = value
    return grad


@paths
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bad_step_is_as_if_it_had_not_been(path, bad, dtype):
    clean, dirty = parameters(*SHAPES, dtype=dtype), parameters(*SHAPES, dtype=dtype)
    rows = gradients(clean, 6, spike_every=4)
    options = {"reset_interval": 3, "decay_steps": 5, "weight_decay": 0.1, **path}
    expected = train(clean, rows, **options)
    optimizer = StableSPAM(dirty, **options)
    for row in rows:
        before = snapshot(optimizer) if optimizer.state else None
        train(dirty, [[spoil(grad, bad) for grad in row]], optimizer)
        assert optimizer.statistics["nonfinite"].tolist() == [1, 1, 1]
        assert before is None or assert_identical(snapshot(optimizer), before) is None
        train(dirty, [row], optimizer)
        assert optimizer.statistics["nonfinite"].tolist() == [0, 0, 0]
    assert_identical(snapshot(optimizer), snapshot(expected))


@paths
def test_only_the_bad_tensor_waits(path):
    params = parameters(*SHAPES)
    optimizer = train(params, gradients(params, 2), **path)
    before = snapshot(optimizer)
    (row,) = gradients(params, 1, seed=5)
    train(params, [[row[0], spoil(row[1], math.nan), row[2]]], optimizer)
    after = snapshot(optimizer)
    assert optimizer.statistics["nonfinite"].tolist() == [0, 1, 0]
    assert_identical(after[1:2], before[1:2])
    assert all(after[i]["step"] == 3 and not torch.equal(after[i]["weight"], before[i]["weight"]) for i in (0, 2))


@paths
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 1e-20, 1e18])
def test_extreme_gradients_train_on(path, size):
    params = parameters((8, 6))
    before = params[0].detach().clone()
    optimizer = train(params, [[torch.full((8, 6), size)]] * 3, lr=0.1, eps=0.0 if size > 1e-30 else 1e-8, **path)
    assert all(value.isfinite().all() for entry in snapshot(optimizer) for value in entry.values())
    assert optimizer.statistics["nonfinite"].item() == 0
    if size > 1e-30:  # below, the trackers have but a few bits left: finite is all one can ask
        torch.testing.assert_close(params[0].detach(), before - 0.3, rtol=1e-4, atol=1e-4)
    elif size == 0:
        assert torch.equal(params[0], before)


@paths
def test_a_gradient_whose_squared_norm_leaves_float32_is_passed_over(path):
    params = parameters((8, 6))
    optimizer = train(params, [[torch.full((8, 6), 0.1)]], **path)
    before = snapshot(optimizer)
    train(params, [[torch.full((8, 6), 1e38)]], optimizer)
    assert optimizer.statistics["nonfinite"].item() == 1
    assert_identical(snapshot(optimizer), before)
    train(params, [[torch.full((8, 6), 0.1)]], optimizer)
    assert optimizer.state[params[0]]["step"] == 2


@paths
def test_a_gradient_of_zeros_moves_the_trackers_and_decays_the_moments(path):
    params = parameters((8, 6))
    optimizer = train(params, [[torch.full((8, 6), 0.5)]], **path)
    before = snapshot(optimizer)[0]
    train(params, [[torch.zeros(8, 6)]], optimizer)
    after = snapshot(optimizer)[0]
    assert after["step"] == 2
    torch.testing.assert_close(after["exp_avg"], 0.9 * before["exp_avg"])
    torch.testing.assert_close(after["clip_max"], 0.999 * before["clip_max"])
    torch.testing.assert_close(after["norm_mean"], 0.7 * before["norm_mean"])
