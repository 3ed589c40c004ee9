"""The fast path on the CPU: both of its updates, its pieces and blocks, and every memory layout."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from hf_stablespam.optim import StableSPAM, cpu_scratch, cpu_sweep, fused_cpu, pieces
from hf_stablespam.optim.dispatch import choose_path, loop_step
from hf_stablespam.optim.fused_cpu import fused_cpu_step
from tests.optim.common import TOLERANCE, assert_identical, gradients, parameters, snapshot, train
from tests.reference.stable_spam import Hyperparameters, Reference

SHAPES = [(37, 21), (130,), (), (3, 4, 5), (64,)]


@pytest.fixture(params=["numba", "torch"])
def sweep(request, monkeypatch):
    """One of the two ways to read a gradient."""
    if request.param == "numba":
        pytest.importorskip("numba", reason="numba (extra: cpu) is not installed")
    else:
        monkeypatch.setattr(cpu_sweep, "compiled_sweep", lambda: None)
    return request.param


@pytest.fixture(params=["direct", "scratch"])
def update(request, monkeypatch, sweep):
    """One of the two updates, on tensors cut into many pieces of many blocks, read in one of the two ways."""
    if request.param == "scratch":
        monkeypatch.setattr(fused_cpu, "direct_coefficients", lambda *_: None)
    for module in (pieces, cpu_sweep, cpu_scratch):
        for name, size in {"BLOCK": 8, "PIECE": 64, "LONG": 128}.items():
            monkeypatch.setattr(module, name, size, raising=hasattr(module, name))
    return request.param


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("maximize", [False, True])
def test_both_updates_follow_the_reference(update, dtype, maximize):
    params = parameters(*SHAPES, dtype=dtype)
    rows = gradients(params, 25, spike_every=3)
    options = {"lr": 1e-2, "weight_decay": 0.1, "reset_interval": 7, "decay_steps": 12}
    references = [Reference(p, Hyperparameters(**options)) for p in params]
    train(params, rows, maximize=maximize, **options)
    rtol, atol = TOLERANCE[dtype]
    for index, reference in enumerate(references):
        for row in rows:
            reference.step(-row[index] if maximize else row[index])
        torch.testing.assert_close(params[index].detach().double(), reference.weight, rtol=rtol, atol=10 * atol)


def test_the_direct_update_was_direct_and_the_other_not(update):
    params = parameters((200, 100))
    optimizer = train(params, gradients(params, 3))
    assert (optimizer.state[params[0]]["exp_avg_scale"] != 1) == (update == "direct")


def test_small_tensors_show_their_true_moments(update):
    params = parameters((100, 100))
    state = train(params, gradients(params, 3)).state[params[0]]
    twins = parameters((100, 100))
    by_loop = train(twins, gradients(twins, 3), foreach=False, fused=False).state[twins[0]]
    assert state["exp_avg_scale"] == state["exp_avg_sq_scale"] == 1
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(state[name], by_loop[name], rtol=1e-4, atol=1e-9)


def test_large_tensors_are_updated_directly():
    params = parameters((200, 100))
    optimizer = train(params, gradients(params, 2))
    state = optimizer.state[params[0]]
    assert state["exp_avg_scale"] != 1
    moments = parameters((200, 100))
    by_loop = train(moments, gradients(params, 2), foreach=False, fused=False).state[moments[0]]
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(state[name] * state[f"{name}_scale"], by_loop[name], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spikes", [1, 5, cpu_sweep.MANY, cpu_sweep.MANY + 1, 37 * 21 // 2], ids="{} spikes".format)
def test_few_and_many_spikes_are_counted_and_clipped_as_by_the_loop(update, spikes, dtype):
    params, twins = parameters((37, 21), dtype=dtype), parameters((37, 21), dtype=dtype)
    rows = gradients(params, 8)
    for row in rows[3::2]:
        places = torch.randperm(37 * 21, generator=torch.Generator().manual_seed(spikes))[:spikes]
        row[0].view(-1)[places] = (torch.arange(spikes) % 3 + 1).to(dtype) * (-1) ** torch.arange(spikes)
    optimizer, loop = (StableSPAM(ps, lr=1e-2, fused=fused) for ps, fused in ((params, True), (twins, False)))
    for row in rows:
        train(params, [row], optimizer)
        train(twins, [row], loop)
        for name in ("clipped", "stable_norm", "clip_threshold"):
            torch.testing.assert_close(optimizer.statistics[name], loop.statistics[name], rtol=1e-5, atol=0)
    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(params[0], twins[0], rtol=rtol, atol=10 * atol)


@pytest.mark.parametrize("values", ["zeros", "tiny", "all spikes", "one sign"])
def test_unusual_gradients_follow_the_reference(update, values):
    params = parameters((37, 21), dtype=torch.float64)
    rows = gradients(params, 9)
    unusual = {
        "zeros": lambda g: g * 0,
        "tiny": lambda g: g * 1e-20,
        "all spikes": lambda g: g.sign() * 50,
        "one sign": lambda g: -g.abs() * 30,
    }[values]
    rows = [[unusual(row[0])] if step % 3 == 2 else row for step, row in enumerate(rows)]
    reference = Reference(params[0], Hyperparameters(lr=1e-2))
    optimizer = train(params, rows[:6], lr=1e-2)
    assert optimizer.statistics["clipped"].item() == (
        37 * 21 if values == "all spikes" else pytest.approx(390, abs=390)
    )
    train(params, rows[6:], optimizer)
    for (grad,) in rows:
        reference.step(grad)
    torch.testing.assert_close(params[0].detach(), reference.weight, rtol=0, atol=1e-9)


def test_the_gradient_is_untouched_even_when_the_update_fails(update, monkeypatch):
    params = parameters((37, 21))
    rows = gradients(params, 4, spike_every=4)
    optimizer = train(params, rows[:3])

    def fail(*_, **__):
        raise RuntimeError("stop")

    params[0].grad = rows[3][0].clone()
    monkeypatch.setattr(torch, "_fused_adamw_", fail)
    with pytest.raises(RuntimeError, match="stop"):
        optimizer.step()
    assert torch.equal(params[0].grad, rows[3][0])


def layouts(seed=0):
    torch.manual_seed(seed)
    base = torch.randn(4, 6, 8, 10)
    return {
        "channels last": base.clone().to(memory_format=torch.channels_last),
        "transposed": torch.randn(12, 20).t(),
        "strided": torch.randn(12, 40)[:, ::2],
        "offset": torch.randn(500)[100:300],
        "size one": torch.randn(1, 30, 1),
    }


@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("grad_layout", ["the same", "contiguous"])
def test_every_layout_gives_what_a_contiguous_tensor_gives(update, layout, grad_layout):
    value = layouts()[layout]
    odd, plain = torch.nn.Parameter(value), torch.nn.Parameter(value.contiguous().clone())
    assert odd.stride() == value.stride()
    one, two = StableSPAM([odd], lr=0.1), StableSPAM([plain], lr=0.1)
    for (grad,) in gradients([plain], 6, spike_every=3):
        odd.grad = torch.empty_like(odd).copy_(grad) if grad_layout == "the same" else grad.clone()
        plain.grad = grad.clone()
        one.step()
        two.step()
    torch.testing.assert_close(odd.detach().contiguous(), plain.detach(), rtol=1e-5, atol=1e-5)


def test_layouts_that_cannot_be_flattened_take_the_loop():
    options = StableSPAM([torch.nn.Parameter(torch.ones(2))]).param_groups[0]
    weight = torch.ones(12, 20)
    state = {"exp_avg": torch.zeros(12, 20), "exp_avg_sq": torch.zeros(12, 20)}
    assert choose_path(weight, torch.ones(12, 20), state, options) is fused_cpu_step
    for grad in (torch.ones(20, 12).t(), torch.ones(1, 20).expand(12, 20)):
        assert choose_path(weight, grad, state, options) is loop_step


def test_states_go_from_path_to_path(update):
    choices = [{}, {"foreach": True}, {"foreach": False, "fused": False}, {"foreach": False}]
    params = parameters(*SHAPES, dtype=torch.float64)
    rows = gradients(params, 16, spike_every=3)
    options = {"lr": 1e-2, "reset_interval": 6}
    references = [Reference(p, Hyperparameters(**options)) for p in params]
    saved = None
    for turn in range(8):
        optimizer = StableSPAM(params, **options)
        if saved is not None:
            optimizer.load_state_dict(saved)
        optimizer.param_groups[0].update({"foreach": None, "fused": None} | choices[turn % 4])
        saved = train(params, rows[2 * turn : 2 * turn + 2], optimizer).state_dict()
    for index, reference in enumerate(references):
        for row in rows:
            reference.step(row[index])
        torch.testing.assert_close(params[index].detach(), reference.weight, rtol=0, atol=1e-9)


def test_switching_everything_off_midway_continues_with_the_true_moments():
    params = parameters((200, 100))
    twins = parameters((200, 100))
    rows = gradients(params, 6)
    off = {"clip_beta": None, "norm_betas": None, "reset_interval": None}
    direct, loop = train(params, rows[:3]), train(twins, rows[:3], foreach=False, fused=False)
    for optimizer in (direct, loop):
        optimizer.param_groups[0].update(off)
    train(params, rows[3:], direct)
    train(twins, rows[3:], loop)
    torch.testing.assert_close(params[0], twins[0], rtol=1e-5, atol=1e-6)


def test_a_resumed_run_of_large_tensors_is_the_same_run():
    straight, halfway = parameters((200, 100), (300,)), parameters((200, 100), (300,))
    rows = gradients(straight, 10, spike_every=3)
    expected = train(straight, rows, reset_interval=4)
    saved = train(halfway, rows[:5], reset_interval=4).state_dict()
    second = StableSPAM(halfway)
    second.load_state_dict(saved)
    assert_identical(snapshot(train(halfway, rows[5:], second)), snapshot(expected))


@pytest.mark.parametrize("spread", ["a few spikes", "nothing but spikes"])
def test_no_temporary_is_larger_than_the_largest_tensor(spread):
    params = parameters(*[(600, 512)] * 6)
    rows = gradients(params, 2, spike_every=2)
    if spread == "nothing but spikes":
        rows[1] = [grad.sign() * 100 for grad in rows[1]]
    optimizer = train(params, rows[:1])
    for param, grad in zip(params, rows[1], strict=True):
        param.grad = grad
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        optimizer.step()
    sizes = [e.nbytes() for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert sizes
    assert max(sizes) <= params[0].nbytes, sorted(sizes)[-5:]
