"""Parameters of fewer bits: statistics stay float32, moments may, and small updates arrive by stochastic rounding."""

import pytest
import torch

from hf_stablespam.optim import StableSPAM
from hf_stablespam.optim.state.stochastic_rounding import stochastic_bfloat16
from tests.optim.common import PATHS, TOLERANCE, assert_identical, gradients, parameters, snapshot, train
from tests.reference.stable_spam import Hyperparameters, Reference

paths = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@paths
@HALVES
@pytest.mark.parametrize("state_dtype", [None, torch.float32], ids=str)
def test_half_precision_follows_the_reference(path, dtype, state_dtype):
    params = parameters((37, 21), (8,), dtype=dtype)
    rows = gradients(params, 6, spike_every=3)
    references = [Reference(p, Hyperparameters(lr=1e-2)) for p in params]
    train(params, rows, lr=1e-2, state_dtype=state_dtype, **path)
    rtol, atol = TOLERANCE[dtype]
    for index, reference in enumerate(references):
        for row in rows:
            reference.step(row[index])
        torch.testing.assert_close(params[index].detach().double(), reference.weight, rtol=rtol, atol=6 * atol)


@paths
@HALVES
def test_trackers_and_statistics_are_float32(path, dtype):
    params = parameters((37, 21), dtype=dtype)
    optimizer = train(params, gradients(params, 3), state_dtype=torch.float32, **path)
    state = optimizer.state[params[0]]
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert {value.dtype for value in optimizer.statistics.values()} == {torch.float32}


@paths
def test_the_slow_average_does_not_stall_in_bfloat16(path):
    params = parameters((4, 4), dtype=torch.bfloat16)
    optimizer = train(params, [[torch.ones(4, 4, dtype=torch.bfloat16)]] * 600, lr=1e-5, **path)
    assert optimizer.state[params[0]]["clip_max"].item() == pytest.approx(1 - 0.999**600, rel=1e-4)


def test_moments_have_the_dtype_asked_for():
    for dtype, state_dtype, expected in [
        (torch.bfloat16, None, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float16, None, torch.float32),  # V would underflow in float16
    ]:
        params = parameters((5, 4), dtype=dtype)
        optimizer = train(params, gradients(params, 1), state_dtype=state_dtype)
        assert optimizer.state[params[0]]["exp_avg"].dtype == expected
        twin = StableSPAM(params, state_dtype=state_dtype)
        twin.load_state_dict(optimizer.state_dict())
        assert_identical(snapshot(twin), snapshot(optimizer))


@paths
def test_updates_too_small_for_bfloat16_arrive_by_stochastic_rounding_only(path):
    # 100 steps of 1e-5 down from 1: bfloat16's neighbour of 1 is 0.0039 away, so rounding to nearest loses each step
    def weight_after(stochastic):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.ones(200, 100, dtype=torch.bfloat16))
        optimizer = StableSPAM([weight], lr=1e-5, stochastic_rounding=stochastic, reset_interval=None, **path)
        train([weight], [[torch.ones_like(weight)]] * 100, optimizer)
        return weight.detach().double().mean().item()

    assert weight_after(False) == 1
    assert weight_after(True) == pytest.approx(1 - 100 * 1e-5, abs=1e-4)


def test_stochastic_rounding_is_unbiased_and_seeded():
    values = torch.tensor([1 + 2**-9, -3.001, 1e-20, 0.1]).repeat_interleave(50_000)
    first = stochastic_bfloat16(values, torch.Generator().manual_seed(1))
    again = stochastic_bfloat16(values, torch.Generator().manual_seed(1))
    assert torch.equal(first, again)
    assert torch.equal(first, first.bfloat16().float())
    means = first.view(4, -1).double().mean(1)
    spacing = torch.tensor([2**-7, 2**-6, 1e-20 * 2**-7, 2**-11]).double()
    assert ((means - values.view(4, -1)[:, 0]).abs() < 0.02 * spacing).all()


def test_stochastic_rounding_keeps_what_is_exact_and_what_is_not_a_number():
    special = torch.tensor([0.0, -0.0, 1.0, -2.5, torch.inf, -torch.inf])
    assert torch.equal(stochastic_bfloat16(special), special)
    assert stochastic_bfloat16(torch.tensor([torch.nan])).isnan().all()


@paths
def test_stochastic_rounding_leaves_other_dtypes_and_passed_over_tensors_alone(path):
    plain, rounded = parameters((40, 30)), parameters((40, 30))
    rows = gradients(plain, 3)
    train(plain, rows, **path)
    train(rounded, rows, stochastic_rounding=True, **path)
    assert torch.equal(*plain, *rounded)
    (weight,) = parameters((40, 30), dtype=torch.bfloat16)
    before = weight.detach().clone()
    train([weight], [[torch.full_like(weight, torch.nan)]], stochastic_rounding=True, **path)
    assert torch.equal(weight, before)


@paths
def test_a_step_that_grad_scaler_skips_touches_nothing(path):
    model = torch.nn.Linear(6, 5)
    optimizer = StableSPAM(model.parameters(), lr=0.1, **path)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    inputs = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))

    def step(spoil=False):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(inputs).square().mean()
        scaler.scale(loss).backward()
        if spoil:
            model.weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        return loss.item()

    first = step()
    before = snapshot(optimizer)
    step(spoil=True)
    assert_identical(snapshot(optimizer), before)
    assert scaler.get_scale() == 2.0
    step()
    assert optimizer.state[model.weight]["step"] == 2
    for _ in range(5):
        last = step()
    assert last < first


def test_scaled_and_unscaled_training_agree():
    # GradScaler unscales before the step, so that no statistic ever sees the scale
    scaled, plain = parameters((6, 5)), parameters((6, 5))
    rows = gradients(plain, 5)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = StableSPAM(scaled)
    for (grad,) in rows:
        scaler.scale((scaled[0] * grad).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    train(plain, rows)
    assert torch.equal(scaled[0], plain[0])
