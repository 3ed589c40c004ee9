"""Remove any one stage of the method and a golden comparison fails: no stage is untested, in no backend."""

import pytest
import torch

from hf_stablespam.optim import formulas as equations
from hf_stablespam.optim import plan, step
from tests.optim.common import PATHS, assert_identical, parameters, snapshot, train
from tests.optim.test_golden import FILES, load

REMOVED = {
    "clip": ("clip_threshold", lambda t, grad_max, step, clip_beta: (t, torch.full_like(grad_max, torch.inf))),
    "normalise": ("norm_factor", lambda target, norm: torch.ones_like(norm)),
    "reset": ("is_reset_step", lambda step, interval: step < 0),
    "decay": ("cosine_decay", lambda step, steps, floor: 1.0),
    "bias correction": ("adam_sizes", lambda lr, betas, step, eps: (lr * torch.ones_like(step), eps + 0 * step)),
    "debiasing of the threshold": (
        "clip_threshold",
        lambda t, grad_max, step, clip_beta: ((new := clip_beta * t + (1 - clip_beta) * grad_max), new),
    ),
}
# a coefficient that a backend could forget to use → its value where it does nothing
NEUTRAL = {
    **{"threshold": torch.inf, "ratio": 1, "factor": 1, "keep": 0, "enter": 1, "keep_sq": 0, "enter_sq": 1},
    **{"size": 0, "decay": 1, "eps": 1e-2},
}
# which of the golden trajectories shows it
SHOWS = {"reset": "reset", "decay": "reset_decay_wd"}
paths = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


def largest_error(name, path):
    tensors, options = load(name)
    params = [torch.nn.Parameter(tensors[f"param.{i}"].clone()) for i in range(3)]
    rows = [[tensors[f"grads.{i}"][step] for i in range(3)] for step in range(len(tensors["grads.0"]))]
    train(params, rows, **options, **path)
    return max((param - tensors[f"paper.{i}"][-1]).abs().max().item() for i, param in enumerate(params))


@paths
@pytest.mark.parametrize("name", FILES)
def test_with_all_stages_every_backend_ends_where_the_golden_trajectories_end(path, name):
    assert largest_error(name, path) < 1e-9


@paths
@pytest.mark.parametrize("stage", REMOVED)
def test_without_one_stage_it_does_not(path, stage, monkeypatch):
    monkeypatch.setattr(plan, *REMOVED[stage])
    assert largest_error(SHOWS.get(stage, "no_reset"), path) > 1e-5


@paths
@pytest.mark.parametrize("coefficient", NEUTRAL)
def test_every_backend_uses_every_coefficient(path, coefficient, monkeypatch):
    decide = step.plan_update

    def without(*arguments):
        decided = decide(*arguments)
        value = torch.full_like(decided.by.size, NEUTRAL[coefficient])
        return decided._replace(by=decided.by._replace(**{coefficient: value}))

    monkeypatch.setattr(step, "plan_update", without)
    assert largest_error("reset_decay_wd", path) > 1e-5


@paths
def test_without_the_bias_correction_of_the_trackers_it_does_not(path, monkeypatch):
    monkeypatch.setattr(equations, "bias_correction", lambda beta, step: torch.ones_like(step))
    assert largest_error("no_reset", path) > 1e-5


@paths
def test_without_the_non_finite_guard_a_bad_gradient_spoils_the_tensor(path, monkeypatch):
    def after_a_bad_gradient():
        params = parameters((6, 5))
        optimizer = train(params, [[torch.ones(6, 5)]], **path)
        before = snapshot(optimizer)
        train(params, [[torch.full((6, 5), torch.nan)]], optimizer)
        return before, snapshot(optimizer)

    assert_identical(*after_a_bad_gradient())
    monkeypatch.setattr(plan, "is_usable", lambda norm: torch.ones_like(norm) > 0)
    before, after = after_a_bad_gradient()
    assert any(not torch.equal(before[0][name], after[0][name]) for name in before[0])
