"""What every torch optimizer does, `StableSPAM` does."""

import pytest
import torch

from hf_stablespam.optim import StableSPAM
from tests.optim.common import PATHS, assert_identical, gradients, parameters, snapshot, train

paths = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


@paths
def test_a_closure_is_evaluated_with_gradients_and_its_loss_returned(path):
    (weight,) = parameters((4,))
    optimizer = StableSPAM([weight], **path)

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    expected = weight.detach().square().sum()
    assert optimizer.step(closure) == expected
    assert optimizer.step(closure) < expected


def test_step_hooks_run_around_the_step():
    (weight,) = parameters((4,))
    optimizer, seen = StableSPAM([weight]), []
    optimizer.register_step_pre_hook(lambda *_: seen.append(weight.detach().clone()))
    optimizer.register_step_post_hook(lambda *_: seen.append(weight.detach().clone()))
    train([weight], gradients([weight], 1), optimizer)
    assert len(seen) == 2
    assert not torch.equal(*seen)


@paths
def test_a_tensor_learning_rate_does_what_the_number_does(path):
    by_number, by_tensor = parameters((6, 5), (3,)), parameters((6, 5), (3,))
    rows = gradients(by_number, 5)
    train(by_number, rows, lr=0.01, weight_decay=0.1, **path)
    train(by_tensor, rows, lr=torch.tensor(0.01), weight_decay=0.1, **path)
    for a, b in zip(by_number, by_tensor, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@paths
def test_zero_gradients_at_learning_rate_zero_change_no_weight(path):
    params = parameters((6, 5), (), (3,))
    before = [p.detach().clone() for p in params]
    optimizer = train(params, [[torch.zeros_like(p) for p in params]] * 2, lr=0.0, weight_decay=0.1, **path)
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
    assert all(value.isfinite().all() for entry in snapshot(optimizer) for value in entry.values())


def test_zero_grad_frees_or_zeroes():
    (weight,) = parameters((4,))
    optimizer = train([weight], gradients([weight], 1))
    optimizer.zero_grad(set_to_none=False)
    assert torch.equal(weight.grad, torch.zeros(4))
    optimizer.zero_grad()
    assert weight.grad is None


@paths
def test_groups_have_options_of_their_own(path):
    apart, together = parameters((6, 5), (3, 2)), parameters((6, 5), (3, 2))
    rows = gradients(apart, 6, spike_every=3)
    first, second = {"lr": 0.01, "clip_beta": None}, {"lr": 0.1, "reset_interval": 3, "norm_betas": (0.85, 0.99)}
    train(apart[:1], [row[:1] for row in rows], **first, **path)
    train(apart[1:], [row[1:] for row in rows], **second, **path)
    groups = [{"params": together[:1], **first}, {"params": together[1:], **second}]
    train(together, rows, StableSPAM(groups, **path))
    assert all(torch.equal(a, b) for a, b in zip(apart, together, strict=True))


@paths
def test_a_group_added_midway_begins_at_its_own_step_one(path):
    first, late = parameters((6, 5), (3, 2))
    rows = gradients([first, late], 6)
    optimizer = StableSPAM([first], **path)
    train([first], [row[:1] for row in rows[:3]], optimizer)
    optimizer.add_param_group({"params": [late], "lr": 0.1})
    train([first, late], rows[3:], optimizer)
    assert [optimizer.state[p]["step"].item() for p in (first, late)] == [6, 3]
    (alone,) = parameters((6, 5), (3, 2))[1:]
    train([alone], [row[1:] for row in rows[3:]], lr=0.1, **path)
    assert torch.equal(alone, late)


@paths
def test_a_parameter_without_a_gradient_waits(path):
    params = parameters((6, 5), (3, 2))
    rows = gradients(params, 6)
    with_gaps = [row if step % 2 else [row[0], None] for step, row in enumerate(rows)]
    optimizer = train(params, with_gaps, **path)
    assert optimizer.state[params[1]]["step"] == 3
    (alone,) = parameters((6, 5), (3, 2))[1:]
    train([alone], [row[1:] for row in rows[1::2]], **path)
    assert torch.equal(alone, params[1])


def test_a_learning_rate_scheduler_is_heard():
    (weight,) = parameters((4,))
    optimizer = StableSPAM([weight], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    train([weight], gradients([weight], 1), optimizer)
    scheduler.step()
    before = snapshot(optimizer)[0]["weight"]
    train([weight], gradients([weight], 1), optimizer)
    assert torch.equal(weight, before)


def test_the_same_run_twice_is_the_same():
    def run():
        params = parameters((33, 20), (7,))
        return snapshot(train(params, gradients(params, 6, spike_every=2), reset_interval=4))

    assert_identical(run(), run())
