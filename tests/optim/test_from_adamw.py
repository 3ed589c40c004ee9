"""A run of `torch.optim.AdamW` goes on with `StableSPAM`: no jump, and no silent mistake."""

import logging

import pytest
import torch

from hf_stablespam.optim import StableSPAM
from hf_stablespam.optim.state import low_bit
from tests.optim.common import PATHS, assert_identical, gradients, parameters, snapshot, train

paths = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
OFF = {"clip_beta": None, "norm_betas": None, "reset_interval": None}


def problem(scale=1.0):
    """A least-squares problem with a weight large enough for every path, and its loss."""
    generator = torch.Generator().manual_seed(0)
    inputs, target = torch.randn(200, 150, generator=generator), torch.randn(150, 120, generator=generator)
    weight = torch.nn.Parameter(torch.zeros(150, 120))
    return weight, lambda: scale * (inputs @ (weight - target)).square().mean()


def run(optimizer, loss, steps):
    """Losses before each step."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def switched(path, steps=30, scale=1.0, **options):
    weight, loss = problem(scale)
    first = torch.optim.AdamW([weight], lr=1e-2, weight_decay=0.0, eps=1e-12)  # ε weighs differently in each scale
    before = run(first, loss, steps)
    second = StableSPAM([weight], lr=1e-2, **options, **path)
    second.load_state_dict(first.state_dict())
    return weight, loss, first, second, before


def assert_next_step_is_adamws(weight, loss, first, second):
    """The step of `second`, which has taken over from `first`, is the one that AdamW would have made."""
    twin = torch.nn.Parameter(weight.detach().clone())
    adamw = torch.optim.AdamW([twin], lr=1e-2, weight_decay=0.0)
    adamw.load_state_dict(first.state_dict())
    run(second, loss, 1)
    twin.grad = weight.grad.clone()
    adamw.step()
    torch.testing.assert_close(weight, twin, rtol=1e-5, atol=1e-6)


@paths
def test_step_and_moments_are_kept_and_trackers_start_fresh(path):
    weight, _, first, second, _ = switched(path)
    state = second.state[weight]
    assert state["step"] == state["moment_step"] == state["adopted_at"] == 30
    assert state["clip_max"] == state["norm_mean"] == state["norm_sq"] == 0
    assert torch.equal(state["exp_avg"], first.state[weight]["exp_avg"])


@paths
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_neither_update_nor_loss_jumps_at_the_switch(path, scale):
    weight, loss, _, second, before = switched(path, scale=scale)
    old = weight.detach().clone()
    after = run(second, loss, 1)
    assert (weight.detach() - old).norm() < 1.5 * 1e-2 * old.numel() ** 0.5
    after += run(second, loss, 30)
    assert all(later < 1.01 * earlier for earlier, later in zip([before[-1], *after[:-1]], after, strict=True))


@paths
def test_the_first_step_after_the_switch_is_adamws_own(path):
    # the first factor f scales gradient and moments alike, so M/√V is what AdamW would have had
    weight, loss, first, second, _ = switched(path, clip_beta=0.999, reset_interval=None)
    assert_next_step_is_adamws(weight, loss, first, second)


@paths
def test_without_the_rescaling_the_update_would_explode(path):
    # what the test above guards against: the same moments taken as they are
    weight, loss, _, second, _ = switched(path, scale=1e-4)
    old = weight.detach().clone()
    second.state[weight]["adopted_at"].zero_()
    second.state[weight]["moment_step"].fill_(5000)  # late in a run no bias correction tempers it
    run(second, loss, 1)
    assert (weight.detach() - old).norm() > 2 * 1e-2 * old.numel() ** 0.5


@paths
def test_trackers_are_debiased_by_what_they_have_seen(path):
    weight, _, _, second, _ = switched(path)
    train([weight], [[torch.full_like(weight, 0.5)]], second)
    assert second.statistics["clip_threshold"].item() == pytest.approx(0.5)
    assert second.statistics["stable_norm"].item() == pytest.approx(1.0, rel=1e-4)


@paths
def test_a_bad_gradient_right_after_the_switch_defers_the_rescaling(path):
    weight, loss, first, second, _ = switched(path, reset_interval=None)
    before = snapshot(second)
    train([weight], [[torch.full_like(weight, torch.nan)]], second)
    assert_identical(snapshot(second), before)
    assert_next_step_is_adamws(weight, loss, first, second)


@pytest.mark.parametrize("choice", [*PATHS.values(), {"state_bits": 8}, {"state_bits": 4}], ids=[*PATHS, "8", "4"])
@pytest.mark.parametrize("through_a_checkpoint", [False, True], ids=["at once", "resumed"])
@pytest.mark.parametrize("scale", [1e-2, 1e4])
def test_zero_gradients_right_after_the_switch_defer_the_rescaling(choice, through_a_checkpoint, scale):
    """An expert without tokens, say: the first gradient of all tells nothing of the scale."""
    if "state_bits" in choice:
        pytest.importorskip("torchao.optim", reason="low-bit states are torchao's (extra lowbit)")
    weight, loss, first, second, _ = switched(choice, reset_interval=None, clip_beta=None, scale=scale)
    twin = torch.nn.Parameter(weight.detach().clone())
    adamw = torch.optim.AdamW([twin], lr=1e-2, weight_decay=0.0)
    adamw.load_state_dict(first.state_dict())
    zeros = [[torch.zeros_like(weight)]] * 3
    train([weight], zeros, second)
    train([twin], zeros, adamw)
    if through_a_checkpoint:
        saved, second = second.state_dict(), StableSPAM([weight], **choice)
        second.load_state_dict(saved)
    run(second, loss, 1)
    train([twin], [[weight.grad]], adamw)
    factor = second.statistics["norm_factor"]
    for name, by in (("exp_avg", factor), ("exp_avg_sq", factor**2)):
        ours, theirs = low_bit.read(second.state[weight][name], torch.float32), adamw.state[twin][name] * by
        tolerance = {None: 1e-4, 8: 0.05, 4: 0.3}[choice.get("state_bits")]
        assert (ours - theirs).norm() < tolerance * theirs.norm(), name


@paths
def test_the_rescaling_comes_once(path):
    """Gradients whose squares float32 has no numbers for leave v at zero, but not the other trackers."""
    weight, _, _, second, _ = switched(path, reset_interval=None)
    tiny = [[torch.full_like(weight, 1e-28)]]
    train([weight], tiny, second)
    before = second.state[weight]["exp_avg_sq"].clone()
    train([weight], tiny, second)
    assert second.state[weight]["norm_sq"] == 0
    torch.testing.assert_close(second.state[weight]["exp_avg_sq"], before * 0.999, rtol=1e-3, atol=0)


def test_the_log_says_so_in_one_line(caplog):
    with caplog.at_level(logging.WARNING, logger="hf_stablespam.optim.state.from_adamw"):
        switched({})
    (record,) = caplog.records
    assert "goes on from step 30 of an AdamW run" in record.getMessage()


def test_loading_our_own_state_logs_nothing(caplog):
    params = parameters((3, 2))
    optimizer = train(params, gradients(params, 2))
    StableSPAM(params).load_state_dict(optimizer.state_dict())
    assert not caplog.records


def test_options_adamw_does_not_know_keep_our_values():
    params = parameters((3, 2))
    first = train(params, gradients(params, 2), torch.optim.AdamW(params, lr=0.5, betas=(0.8, 0.9), fused=True))
    second = StableSPAM(params, lr=0.1, clip_beta=0.9, reset_interval=7, decay_steps=11, foreach=True)
    second.load_state_dict(first.state_dict())
    (group,) = second.param_groups
    assert (group["lr"], group["betas"]) == (0.5, (0.8, 0.9))
    assert (group["clip_beta"], group["reset_interval"], group["decay_steps"]) == (0.9, 7, 11)
    assert (group["foreach"], group["fused"]) == (True, None)
    assert not {"amsgrad", "capturable", "decoupled_weight_decay"} & set(group)


def test_with_every_part_off_the_run_is_adamws_to_the_last_bit():
    straight, changed = parameters((33, 20), (7,)), parameters((33, 20), (7,))
    rows = gradients(straight, 10)
    train(straight, rows, torch.optim.AdamW(straight, weight_decay=0.1))
    first = train(changed, rows[:5], torch.optim.AdamW(changed, weight_decay=0.1))
    second = StableSPAM(changed, **OFF)
    second.load_state_dict(first.state_dict())
    train(changed, rows[5:], second)
    assert all(torch.equal(a, b) for a, b in zip(straight, changed, strict=True))


def foreign(make):
    params = parameters((3, 2))
    return train(params, gradients(params, 2), make(params)).state_dict()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: torch.optim.AdamW(p, amsgrad=True), r"parameter 0 .*amsgrad=True \(it holds max_exp_avg_sq\)"),
        (lambda p: torch.optim.Adam(p, weight_decay=0.1), r"weight_decay must be 0 to go on from .*Adam, got 0.1"),
        (lambda p: torch.optim.SGD(p, momentum=0.9), r"lacks step, moment_step, .*exp_avg_sq; .*another optimizer"),
        (lambda p: torch.optim.RMSprop(p), r"state of parameter 0 must hold step, .* but lacks moment_step"),
        (lambda p: torch.optim.NAdam(p), r"must hold step, exp_avg, exp_avg_sq and no more .*holds mu_product too"),
    ],
    ids=["amsgrad", "coupled decay", "SGD", "RMSprop", "NAdam"],
)
def test_other_states_are_refused_by_name_and_nothing_is_loaded(make, message):
    params = parameters((3, 2))
    optimizer = StableSPAM(params)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(foreign(make))
    assert not optimizer.state
    train(params, gradients(params, 1), optimizer)


def test_an_incomplete_adamw_state_names_what_is_missing():
    params = parameters((3, 2), (4,))
    saved = train(params, gradients(params, 2), torch.optim.AdamW(params)).state_dict()
    saved["state"] = {index: dict(state) for index, state in saved["state"].items()}
    del saved["state"][1]["exp_avg_sq"]
    with pytest.raises(ValueError, match=r"state of parameter 1 .*lacks exp_avg_sq; the checkpoint is incomplete"):
        StableSPAM(params).load_state_dict(saved)


def test_load_hooks_of_the_user_still_run_around_ours():
    params = parameters((3, 2))
    optimizer = train(params, gradients(params, 3))
    saved, seen = optimizer.state_dict(), []

    def set_step(_, state_dict):
        state = {**state_dict["state"][0], "step": torch.tensor(41.0)}
        return {**state_dict, "state": {0: state}}

    second = StableSPAM(params)
    second.register_load_state_dict_pre_hook(set_step)
    second.register_load_state_dict_post_hook(lambda o: seen.append(o.state[params[0]]["step"].item()))
    second.load_state_dict(saved)
    assert seen == [41.0]
