"""Remove any one stage of the method and a golden comparison fails: no stage is untested, on no path."""

import pytest
import torch

from hf_stablespam.optim import cpu_direct, fused_cpu, plan
from hf_stablespam.optim import formulas as equations
from hf_stablespam.optim.numbers import constant
from tests.optim.common import PATHS, assert_identical, parameters, snapshot, train
from tests.optim.test_golden import FILES, load

ALL_PATHS = {**PATHS, "fused, by copies": {"fused": True}}

REMOVED = {
    "clip": ("clip_threshold", lambda t, grad_max, step, clip_beta: (t, constant(torch.inf, grad_max))),
    "normalise": ("norm_factor", lambda target, norm: constant(1, norm)),
    "reset": ("is_reset_step", lambda step, interval: step < 0),
    "decay": ("cosine_decay", lambda step, steps, floor: 1.0),
    "bias correction": ("bias_correction", lambda beta, step: constant(1, step)),
    "debiasing of the threshold": (
        "clip_threshold",
        lambda t, grad_max, step, clip_beta: ((new := clip_beta * t + (1 - clip_beta) * grad_max), new),
    ),
}
# which of the golden trajectories shows it
SHOWS = {"reset": "reset", "decay": "reset_decay_wd"}


@pytest.fixture(params=ALL_PATHS)
def path(request, monkeypatch):
    if request.param == "fused, by copies":
        monkeypatch.setattr(fused_cpu, "direct_coefficients", lambda *_: None)
    return ALL_PATHS[request.param]


def largest_error(name, path):
    tensors, options = load(name)
    params = [torch.nn.Parameter(tensors[f"param.{i}"].clone()) for i in range(3)]
    rows = [[tensors[f"grads.{i}"][step] for i in range(3)] for step in range(len(tensors["grads.0"]))]
    train(params, rows, **options, **path)
    return max((param - tensors[f"paper.{i}"][-1]).abs().max().item() for i, param in enumerate(params))


@pytest.mark.parametrize("name", FILES)
def test_with_all_stages_every_path_ends_where_the_golden_trajectories_end(path, name):
    assert largest_error(name, path) < 1e-9


@pytest.mark.parametrize("stage", REMOVED)
def test_without_one_stage_it_does_not(path, stage, monkeypatch):
    if stage == "bias correction":  # on copies PyTorch's AdamW corrects by itself: there it cannot be removed
        monkeypatch.setattr(fused_cpu, "direct_coefficients", cpu_direct.direct_coefficients)
    monkeypatch.setattr(plan, *REMOVED[stage])
    assert largest_error(SHOWS.get(stage, "no_reset"), path) > 1e-5


def test_without_the_bias_correction_of_the_trackers_it_does_not(path, monkeypatch):
    monkeypatch.setattr(equations, "bias_correction", lambda beta, step: constant(1, step))
    assert largest_error("no_reset", path) > 1e-5


def test_without_the_non_finite_guard_a_bad_gradient_spoils_the_tensor(path, monkeypatch):
    def after_a_bad_gradient():
        params = parameters((6, 5))
        optimizer = train(params, [[torch.ones(6, 5)]], **path)
        before = snapshot(optimizer)
        train(params, [[torch.full((6, 5), torch.nan)]], optimizer)
        return before, snapshot(optimizer)

    assert_identical(*after_a_bad_gradient())
    monkeypatch.setattr(plan, "is_usable", lambda norm: constant(1, norm) > 0)
    before, after = after_a_bad_gradient()
    assert any(not torch.equal(before[0][name], after[0][name]) for name in before[0])
