"""The state: saved and loaded exactly, by any road, and complete, so that a resumed run is the same run."""

import copy
import io
import pickle

import pytest
import torch

from hf_stablespam.optim import SPAM, StableSPAM
from tests.optim.common import PATHS, assert_identical, gradients, parameters, snapshot, train

SHAPES = [(17, 9), (6,), ()]
OPTIONS = {"lr": 1e-2, "reset_interval": 6, "decay_steps": 15, "weight_decay": 0.01}
paths = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def through_file(state_dict):
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def resumed(optimizer, params, state_dict, **options):
    """A fresh optimizer over copies of the parameters, with the saved state."""
    params = [torch.nn.Parameter(p.detach().clone()) for p in params]
    fresh = StableSPAM(params, **options)
    fresh.load_state_dict(state_dict)
    return fresh, params


@paths
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_resumed_run_is_the_same_run(path, dtype):
    straight = parameters(*SHAPES, dtype=dtype)
    rows = gradients(straight, 20, spike_every=4)
    halfway = parameters(*SHAPES, dtype=dtype)
    expected = snapshot(train(straight, rows, **OPTIONS, **path))
    first = train(halfway, rows[:10], **OPTIONS, **path)
    second, params = resumed(first, halfway, through_file(first.state_dict()))
    train(params, rows[10:], second)
    assert_identical(snapshot(second), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loading_keeps_values_and_dtypes_exactly(dtype):
    params = parameters(*SHAPES, dtype=dtype)
    optimizer = train(params, gradients(params, 3))
    for p in params:  # values that the parameter's dtype cannot hold
        optimizer.state[p]["step"].fill_(100_001)
        optimizer.state[p]["clip_max"].fill_(1 + 2**-20)
    second, _ = resumed(optimizer, params, through_file(optimizer.state_dict()))
    assert_identical(snapshot(second), snapshot(optimizer))


def test_loading_copies_and_shares_no_memory():
    params = parameters((3, 2))
    optimizer = train(params, gradients(params, 2))
    saved = copy.deepcopy(optimizer.state_dict())
    second, others = resumed(optimizer, params, saved)
    train(others, gradients(others, 2), second)
    assert saved["state"][0]["step"] == 2
    assert torch.equal(saved["state"][0]["exp_avg"], optimizer.state[params[0]]["exp_avg"])


def test_load_state_dict_takes_its_argument_by_name():
    params = parameters((3, 2))
    optimizer = train(params, gradients(params, 2))
    optimizer.load_state_dict(state_dict=optimizer.state_dict())


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_of_the_optimizer_go_on_alike(clone):
    params = parameters(*SHAPES)
    rows = gradients(params, 8, spike_every=3)
    optimizer = train(params, rows[:4], **OPTIONS)
    twin = clone(optimizer)
    assert twin.statistics == {}
    train([p for group in twin.param_groups for p in group["params"]], rows[4:], twin)
    train(params, rows[4:], optimizer)
    assert_identical(snapshot(twin), snapshot(optimizer))


def test_nothing_exists_before_the_first_step():
    params = parameters((3, 2))
    optimizer = StableSPAM(params)
    assert not optimizer.state
    assert optimizer.state_dict()["state"] == {}
    optimizer.reset_moments()
    assert not optimizer.state


def test_a_state_that_lacks_entries_is_refused_by_name():
    params = parameters((3, 2))
    optimizer = train(params, gradients(params, 2))
    saved = optimizer.state_dict()
    saved["state"] = {0: {k: v for k, v in saved["state"][0].items() if k not in ("clip_max", "norm_sq")}}
    with pytest.raises(ValueError, match=r"state of parameter 0.*lacks clip_max, norm_sq"):
        StableSPAM(params).load_state_dict(saved)


def test_a_state_saved_with_scales_loads_exactly():
    """Version 0.1 kept large moments beside numbers to multiply them by."""
    params = parameters((200, 100), (3,))
    rows = gradients(params, 6)
    optimizer = train(params, rows[:3])
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        for name, scale in (("exp_avg", 0.25), ("exp_avg_sq", 2.0**-20)):
            state[name] /= scale
            state[f"{name}_scale"] = torch.tensor(scale)
    second, others = resumed(optimizer, params, saved)
    assert_identical(snapshot(second), snapshot(optimizer))
    assert "exp_avg_scale" in saved["state"][0]
    train(params, rows[3:], optimizer)
    train(others, rows[3:], second)
    assert_identical(snapshot(second), snapshot(optimizer))


@pytest.mark.parametrize("optimizer_cls", [StableSPAM, SPAM])
@pytest.mark.parametrize("other", [{"exp_avg": torch.zeros(40, 8)}, {"exp_avg_sq": torch.zeros(8, 4)}], ids=list)
def test_a_refused_state_changes_nothing(optimizer_cls, other):
    """Moments of another shape stayed where they were put, and the kernels of the next step wrote past their end."""
    params = parameters((4, 8), (3,))
    optimizer = train(params, gradients(params, 2), optimizer_cls(params, lr=0.25))
    before, group = snapshot(optimizer), dict(optimizer.param_groups[0])
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0] |= other
    saved["param_groups"][0]["lr"] = 0.5
    with pytest.raises(ValueError, match=r"parameter 0 must hold exp_avg(_sq)? of shape \(4, 8\), got \("):
        optimizer.load_state_dict(saved)
    assert_identical(snapshot(optimizer), before)
    assert optimizer.param_groups[0] == group
    train(params, gradients(params, 1), optimizer)


@pytest.mark.parametrize("make", [torch.optim.AdamW, StableSPAM], ids=["AdamW", "StableSPAM"])
def test_a_state_of_larger_or_smaller_parameters_is_refused(make):
    smaller, larger = parameters((10, 8)), parameters((400, 8))
    for theirs, ours in ((smaller, larger), (larger, smaller)):
        saved = train(theirs, gradients(theirs, 1), make(theirs)).state_dict()
        optimizer = StableSPAM(ours, lr=0.25)
        with pytest.raises(ValueError, match="parameter 0 must hold exp_avg of shape"):
            optimizer.load_state_dict(saved)
        assert not optimizer.state
        assert optimizer.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize("path", [*PATHS.values(), {}], ids=[*PATHS, "default"])
@pytest.mark.parametrize(
    "parts", [{}, {"clip_beta": None, "norm_betas": None, "reset_interval": None}], ids=["on", "off"]
)
@pytest.mark.parametrize("size", [2, 400])
def test_other_data_in_a_parameter_are_refused_before_anything_is_written(path, parts, size):
    (param,) = params = parameters((20, 8))
    optimizer = train(params, gradients(params, 1), **path, **parts)
    before = snapshot(optimizer)
    param.data = torch.ones(size, 8)
    with pytest.raises(
        ValueError, match=rf"shape of their parameter, \({size}, 8\), got \({size}, 8\), \(20, 8\), \(20, 8\)"
    ):
        train(params, [[torch.ones(size, 8)]], optimizer)
    assert torch.equal(param, torch.ones(size, 8))
    param.data = before[0]["weight"]
    assert_identical(snapshot(optimizer), before)
    param.data = torch.ones(size, 8)
    del optimizer.state[param]
    train(params, [[torch.ones(size, 8)]], optimizer)


@pytest.mark.parametrize("optimizer_cls", [StableSPAM, SPAM])
def test_an_empty_state_is_no_state(optimizer_cls):
    """Reading ``optimizer.state[param]`` before its first gradient leaves one behind."""
    params = parameters((4, 3), (2,))
    optimizer = optimizer_cls(params)
    train(params, [[torch.ones(4, 3), None]], optimizer)
    assert not optimizer.state[params[1]]
    others = parameters((4, 3), (2,))
    second = optimizer_cls(others)
    second.load_state_dict(through_file(optimizer.state_dict()))
    assert others[1] not in second.state
    train(others, gradients(others, 1), second)
