"""The update itself: a first step computed by hand for each part, and what must hold whatever the numbers are."""

import math

import pytest
import torch

from hf_stablespam.optim import StableSPAM
from tests.optim.common import PATHS, assert_identical, gradients, parameters, snapshot, train
from tests.reference.stable_spam import Hyperparameters, Reference

OFF = {"clip_beta": None, "norm_betas": None, "reset_interval": None}
paths = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


def one(values, path, rows, **options):
    """Weights in float64 after the rows of gradients."""
    weight = torch.nn.Parameter(torch.tensor(values, dtype=torch.float64))
    optimizer = train([weight], [[torch.tensor(row, dtype=torch.float64)] for row in rows], **path, **options)
    return weight.detach(), optimizer, optimizer.state[weight]


@paths
def test_adam_alone_by_hand(path):
    # M = 0.1*g, V = 0.001*g^2; both are debiased to g and g^2 in the first step: w = 1 - 0.1*sign(g)
    weight, _, state = one([1.0, 1.0], path, [[3.0, -4.0]], lr=0.1, eps=0.0, **OFF)
    torch.testing.assert_close(weight, torch.tensor([0.9, 1.1], dtype=torch.float64))
    torch.testing.assert_close(state["exp_avg"], torch.tensor([0.3, -0.4], dtype=torch.float64))
    torch.testing.assert_close(state["exp_avg_sq"], torch.tensor([0.009, 0.016], dtype=torch.float64))


@paths
def test_weight_decay_is_decoupled(path):
    weight, _, _ = one([1.0], path, [[2.0]], lr=0.1, eps=0.0, weight_decay=0.5, **OFF)
    assert weight.item() == pytest.approx(1.0 * (1 - 0.1 * 0.5) - 0.1)


@paths
def test_clipping_alone_by_hand(path):
    # first step: T^ = gmax = 4, nothing is clipped; second: T = 0.5*2 + 0.5*12 = 7, T^ = 7/(1 - 0.25) = 28/3
    options = OFF | {"clip_beta": 0.5}
    _, optimizer, state = one([0.0, 0.0, 0.0], path, [[1.0, -4.0, 2.0], [12.0, -3.0, 10.0]], betas=(0, 0.9), **options)
    assert state["clip_max"].item() == pytest.approx(7.0)
    assert optimizer.statistics["clip_threshold"].item() == pytest.approx(28 / 3)
    assert optimizer.statistics["clipped"].item() == 2
    clipped = torch.tensor([28 / 3, -3.0, 10.0 * (28 / 3) / 12.0], dtype=torch.float64)  # scaled, not clamped
    torch.testing.assert_close(state["exp_avg"], clipped)


@paths
def test_normalising_alone_by_hand(path):
    # m = 0.3*5, v = 0.1*25, debiased to 5 and 25: c = 5/(5 + eps), so the gradient gets norm 1
    options = OFF | {"norm_betas": (0.7, 0.9)}
    _, optimizer, state = one([0.0, 0.0], path, [[3.0, -4.0]], betas=(0, 0.9), **options)
    torch.testing.assert_close(state["exp_avg"], torch.tensor([0.6, -0.8], dtype=torch.float64))
    assert state["norm_mean"].item() == pytest.approx(1.5)
    assert state["norm_sq"].item() == pytest.approx(2.5)
    assert optimizer.statistics["norm_factor"].item() == pytest.approx(0.2)
    assert optimizer.statistics["stable_norm"].item() == pytest.approx(1.0)


@paths
def test_a_reset_by_hand(path):
    # the second step is a reset step: its gradient alone is in the moments, and k = 1 debiases them to it
    weight, optimizer, state = one([1.0], path, [[5.0], [2.0]], lr=0.1, eps=0.0, **(OFF | {"reset_interval": 2}))
    assert weight.item() == pytest.approx(1.0 - 0.1 - 0.1)
    assert (state["step"].item(), state["moment_step"].item()) == (2, 1)
    assert state["exp_avg"].item() == pytest.approx(0.2)
    assert state["exp_avg_sq"].item() == pytest.approx(0.004)
    assert optimizer.statistics["reset"].item() == 1


@paths
def test_the_decay_by_hand(path):
    # D = 1: period 2, s(1) = 0.5 + 0.5*(1 + cos(pi/2))/2 = 0.75, s(2) = 0.5 and so for ever
    options = OFF | {"decay_steps": 1}
    _, _, state = one([0.0], path, [[1.0]], betas=(0.8, 0.9), **options)
    assert state["exp_avg"].item() == pytest.approx(1 - 0.75 * 0.8)
    _, _, state = one([0.0], path, [[1.0], [0.0], [0.0]], betas=(0.8, 0.9), **options)
    assert state["exp_avg"].item() == pytest.approx((1 - 0.6) * 0.4 * 0.4)


@paths
def test_a_thousandfold_spike_leaves_nothing_above_the_limit(path):
    params = parameters((40, 30))
    optimizer = train(params, gradients(params, 20), betas=(0, 0.9), norm_betas=None, **path)
    spike = gradients(params, 1, seed=9)[0][0]
    spike[3, 4] = 1000 * spike.abs().max()
    train(params, [[spike]], optimizer)
    threshold = optimizer.statistics["clip_threshold"].item()
    entered = optimizer.state[params[0]]["exp_avg"]
    assert entered.abs().max().item() == pytest.approx(threshold, rel=1e-5)
    assert threshold < spike.abs().max() / 10


@paths
def test_scaling_all_gradients_changes_nothing_but_for_eps(path):
    small, large = parameters((6, 5), dtype=torch.float64), parameters((6, 5), dtype=torch.float64)
    rows = gradients(small, 30, spike_every=7)
    options = {"lr": 1e-2, "reset_interval": 11, "decay_steps": 15, **path}
    train(small, rows, **options)
    train(large, [[grad * 1e4 for grad in row] for row in rows], **options)
    torch.testing.assert_close(small[0], large[0], rtol=1e-6, atol=1e-6)


@paths
def test_twins_with_the_same_gradients_stay_equal_through_a_reset(path):
    params = [torch.nn.Parameter(torch.ones(4, 5)), torch.nn.Parameter(torch.ones(4, 5))]
    rows = [[row[0], row[0]] for row in gradients(params, 12, spike_every=3)]
    train(params, rows, reset_interval=5, decay_steps=6, **path)
    assert torch.equal(*params)


@paths
def test_the_state_after_a_reset_is_that_of_a_fresh_start_but_for_the_trackers(path):
    params = parameters((5, 4), (3,))
    optimizer = train(params, gradients(params, 3), **path)
    before = snapshot(optimizer)
    optimizer.reset_moments()
    for old, new in zip(before, snapshot(optimizer), strict=True):
        assert new["moment_step"] == new["exp_avg"].abs().sum() == new["exp_avg_sq"].sum() == 0
        for kept in ("weight", "step", "clip_max", "norm_mean", "norm_sq"):
            assert torch.equal(old[kept], new[kept])
            assert kept == "weight" or new[kept] > 0


@paths
def test_the_gradient_is_left_as_it_was_found(path):
    params = parameters((50, 60), (7,))
    rows = gradients(params, 4, spike_every=2)
    optimizer = StableSPAM(params, maximize=True, **path)
    for row in rows:
        train(params, [row], optimizer)
        assert all(torch.equal(p.grad, grad) for p, grad in zip(params, row, strict=True))


@paths
def test_maximize_is_the_descent_along_the_negative_gradient(path):
    up, down = parameters((6, 5), (3,)), parameters((6, 5), (3,))
    rows = gradients(up, 8, spike_every=3)
    train(up, rows, maximize=True, **path)
    train(down, [[-grad for grad in row] for row in rows], **path)
    assert all(torch.equal(a, b) for a, b in zip(up, down, strict=True))


@paths
@pytest.mark.parametrize("options", [{}, {"reset_interval": 4, "decay_steps": 9, "weight_decay": 0.1}], ids=["", "all"])
def test_every_path_follows_the_float64_reference(path, options):
    params = parameters((37, 21), (8,), (), (3, 4, 5), dtype=torch.float64)
    rows = gradients(params, 14, spike_every=5)
    references = [Reference(p, Hyperparameters(lr=1e-2, **options)) for p in params]
    train(params, rows, lr=1e-2, **options, **path)
    for index, reference in enumerate(references):
        for row in rows:
            reference.step(row[index])
        torch.testing.assert_close(params[index].detach(), reference.weight, rtol=0, atol=1e-10)


@paths
def test_statistics_name_what_happened(path):
    params = [*parameters((4, 3), (5,)), torch.nn.Parameter(torch.ones(2))]
    optimizer = StableSPAM(params, **path)
    assert optimizer.statistics == {}
    grads = [torch.full((4, 3), 2.0), torch.full((5,), math.inf), None]
    train(params, [grads], optimizer)
    statistics = optimizer.statistics
    assert all(value.shape == (3,) and value.dtype == torch.float32 for value in statistics.values())
    torch.testing.assert_close(statistics["grad_norm"][0], torch.tensor(math.sqrt(12 * 4)))
    assert statistics["grad_max"][0] == 2
    assert statistics["nonfinite"].tolist() == [0, 1, 0]
    assert statistics["norm_factor"][2] == 0
    assert statistics["clipped"].tolist() == [0, 0, 0]


@paths
def test_a_reset_from_outside_is_the_interval_to_the_bit(path):
    own, outside = parameters((200, 100), (30,)), parameters((200, 100), (30,))
    rows = gradients(own, 6)
    expected = train(own, rows, reset_interval=4, **path)
    optimizer = train(outside, rows[:3], reset_interval=None, **path)
    optimizer.reset_moments()
    train(outside, rows[3:], optimizer)
    assert_identical(snapshot(optimizer), snapshot(expected))
