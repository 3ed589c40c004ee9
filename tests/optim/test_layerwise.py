"""LayerwiseStableSPAM: the updates of StableSPAM, made during the backward pass, with one gradient alive at a time."""

import gc

import pytest
import torch
from torch import nn

from hf_stablespam.optim import LayerwiseStableSPAM, StableSPAM
from hf_stablespam.optim.layerwise import remove_hooks
from tests.optim.common import assert_identical, snapshot

OPTIONS = {"lr": 1e-2, "reset_interval": 4, "weight_decay": 0.1}


def make(optimizer_cls, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
    return model, optimizer_cls(model.parameters(), **OPTIONS, **options)


def run(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        torch.manual_seed(step)
        model(torch.randn(5, 12)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("options", [{}, {"rank": 4, "update_proj_gap": 3}], ids=["plain", "galore"])
def test_weights_states_and_statistics_are_those_of_stable_spam(options):
    (ours, layerwise), (theirs, usual) = make(LayerwiseStableSPAM, **options), make(StableSPAM, **options)
    run(ours, layerwise, 10)
    run(theirs, usual, 10)
    assert_identical(snapshot(layerwise), snapshot(usual))
    assert layerwise.statistics.keys() == usual.statistics.keys()
    assert all(torch.equal(layerwise.statistics[name], value) for name, value in usual.statistics.items())


def test_one_gradient_is_alive_at_a_time():
    model, optimizer = make(LayerwiseStableSPAM)
    alive = []
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.grad is not None for p in model.parameters()))
        )
    run(model, optimizer, 2)
    assert alive == [0] * 12  # hooks run in the order of registration: the update has freed the gradient


def test_a_tied_weight_is_updated_once():
    def tied(optimizer_cls):
        torch.manual_seed(0)
        embedding, head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
        head.weight = embedding.weight
        optimizer = optimizer_cls(embedding.parameters(), **OPTIONS)
        for _ in range(3):
            head(torch.tanh(embedding(torch.arange(9)))).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return snapshot(optimizer)

    assert_identical(tied(LayerwiseStableSPAM), tied(StableSPAM))


def test_checkpoints_go_both_ways():
    model, optimizer = make(StableSPAM)
    run(model, optimizer, 4)
    resumed, layerwise = make(LayerwiseStableSPAM)
    resumed.load_state_dict(model.state_dict())
    layerwise.load_state_dict(optimizer.state_dict())
    run(model, optimizer, 4, first=4)
    run(resumed, layerwise, 4, first=4)
    assert_identical(snapshot(layerwise), snapshot(optimizer))
    optimizer.load_state_dict(layerwise.state_dict())


def test_a_scheduler_and_a_closure_work():
    model, optimizer = make(LayerwiseStableSPAM)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    def closure():
        loss = model(torch.ones(1, 12)).square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 5e-3
    assert optimizer.step(closure) < first


def test_a_gradient_that_no_hook_has_seen_is_an_error():
    model, optimizer = make(LayerwiseStableSPAM)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    with pytest.raises(ValueError, match=r"must come from backward\(\), got one set otherwise .* of shape \(16, 12\)"):
        optimizer.step()


def test_frozen_parameters_are_left_alone():
    frozen, trained = nn.Linear(3, 3), nn.Linear(3, 3)
    frozen.requires_grad_(False)
    before = frozen.weight.clone()
    optimizer = LayerwiseStableSPAM([*frozen.parameters(), *trained.parameters()])
    trained(frozen(torch.ones(1, 3))).sum().backward()
    optimizer.step()
    assert torch.equal(frozen.weight, before)
    assert len(optimizer.state) == 2


def test_a_second_optimizer_takes_over_the_parameters_of_the_first():
    model, first = make(LayerwiseStableSPAM)
    second = LayerwiseStableSPAM(model[2:].parameters(), lr=1e-3)
    run(model, second, 1)
    assert [param in first.state for param in model.parameters()] == [True, True, False, False, False, False]
    assert [param in second.state for param in model.parameters()] == [False, False, True, True, True, True]
    assert second.statistics["grad_norm"].ne(0).all()


@pytest.mark.parametrize("deleted", [True, False], ids=["deleted", "unhooked"])
def test_another_kind_of_optimizer_trains_afterwards(deleted):
    model, first = make(LayerwiseStableSPAM)
    run(model, first, 1)
    if deleted:
        del first
        gc.collect()
    else:
        remove_hooks(model.parameters())
    before = [param.detach().clone() for param in model.parameters()]
    run(model, torch.optim.SGD(model.parameters(), lr=0.0), 1)
    assert all(torch.equal(old, param) for old, param in zip(before, model.parameters(), strict=True))
    run(model, torch.optim.SGD(model.parameters(), lr=0.1), 1)
    assert not any(torch.equal(old, param) for old, param in zip(before, model.parameters(), strict=True))


def test_hooks_come_back():
    (ours, interrupted), (theirs, straight) = make(LayerwiseStableSPAM), make(LayerwiseStableSPAM)
    run(ours, interrupted, 2)
    remove_hooks(ours.parameters())
    interrupted.hook_parameters()
    interrupted.hook_parameters()
    run(ours, interrupted, 2, first=2)
    run(theirs, straight, 4)
    assert_identical(snapshot(interrupted), snapshot(straight))
