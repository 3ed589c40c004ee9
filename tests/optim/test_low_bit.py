"""Moments in 8 and 4 bits: torchao's storage, its size, its error, and a run that resumes to the bit."""

import copy
import io
import pickle
import sys

import pytest
import torch

from hf_stablespam.optim import StableSPAM
from hf_stablespam.optim.state import low_bit
from tests.optim.common import gradients, parameters, train

pytest.importorskip("torchao.optim", reason="low-bit states are torchao's (extra lowbit)")

SHAPES = [(64, 80), (7,), (64, 64)]
OPTIONS = {"lr": 1e-2, "reset_interval": 8, "weight_decay": 0.01}
both = pytest.mark.parametrize("bits", [8, 4])


def moments_of(optimizer, param):
    return [low_bit.read(optimizer.state[param][name], torch.float32) for name in ("exp_avg", "exp_avg_sq")]


def bits_of(optimizer):
    """Every bit of the state, in order."""
    found = []
    for param in (p for group in optimizer.param_groups for p in group["params"]):
        for value in optimizer.state[param].values():
            found += [value.codes, value.scale] if low_bit.is_low_bit(value) else [value]
    return [tensor.clone() for tensor in found]


def bytes_of(optimizer):
    return sum(tensor.numel() * tensor.element_size() for tensor in bits_of(optimizer))


@both
@pytest.mark.parametrize("signed", [True, False])
def test_the_codes_are_torchaos_up_to_one_level(bits, signed):
    storage = low_bit.require_torchao(bits)
    value = torch.randn(256, 256) * torch.logspace(-4, 2, 256).unsqueeze(1)
    value = value if signed else value.square()
    theirs, ours = (storage.zeros(value.shape, signed=signed) for _ in range(2))
    theirs.copy_(value)
    low_bit.write(ours, value, torch.tensor(True))
    torch.testing.assert_close(ours.scale, theirs.scale)
    unpacked = [
        state.codes if bits == 8 else torch.stack([state.codes >> 4, state.codes & 15]) for state in (ours, theirs)
    ]
    distance = (unpacked[0].int() - unpacked[1].int()).abs()
    assert (distance != 0).float().mean() < 0.05
    # where torchao stores zero for a second moment, we store the smallest level
    assert distance.max() <= 1


@both
def test_reading_gives_back_what_was_written_up_to_half_a_level(bits):
    value = torch.randn(64, 256)
    state = low_bit.zero_moments(value.shape, bits, torch.device("cpu"))["exp_avg"]
    low_bit.write(state, value, torch.tensor(True))
    levels = state.qmap.sort().values
    half = (levels[1:] - levels[:-1]).max() / 2
    scale = value.abs().amax() * (half + 2**-8)
    assert (low_bit.read(state, torch.float32) - value).abs().max() <= scale


def test_no_second_moment_above_zero_is_stored_as_zero():
    state = low_bit.zero_moments(torch.Size([64, 64]), 8, torch.device("cpu"))["exp_avg_sq"]
    value = torch.zeros(64, 64)
    value[:, 0], value[:, 1] = 1.0, 1e-20
    low_bit.write(state, value, torch.tensor(True))
    stored = low_bit.read(state, torch.float32)
    assert (stored[:, 1] > 0).all()
    assert (stored[:, 2:] == 0).all()


@both
def test_what_is_not_finite_changes_no_bit(bits):
    state = low_bit.zero_moments(torch.Size([64, 64]), bits, torch.device("cpu"))["exp_avg"]
    low_bit.write(state, -torch.rand(64, 64), torch.tensor(True))
    codes, scale = state.codes.clone(), state.scale.clone()
    low_bit.write(state, torch.full((64, 64), torch.nan), torch.tensor(False))
    assert torch.equal(state.codes, codes)
    assert torch.equal(state.scale, scale)


@both
def test_a_nonfinite_gradient_changes_no_bit_of_the_state(bits):
    params = parameters((64, 80))
    optimizer = train(params, gradients(params, 3), state_bits=bits)
    before, weight = bits_of(optimizer), params[0].detach().clone()
    train(params, [[torch.full_like(params[0], torch.inf)]], optimizer)
    assert all(torch.equal(a, b) for a, b in zip(bits_of(optimizer), before, strict=True))
    assert torch.equal(params[0], weight)
    assert optimizer.statistics["nonfinite"] == 1


@both
def test_small_and_odd_tensors_are_kept_in_full(bits):
    shapes = [(64, 64), (63, 64), (4097,), (64, 66)]
    params = parameters(*shapes)
    optimizer = train(params, gradients(params, 1), state_bits=bits)
    kept = [low_bit.is_low_bit(optimizer.state[p]["exp_avg"]) for p in params]
    assert kept == [True, False, False, bits == 4 and 64 * 66 % 128 == 0]


@pytest.mark.parametrize(("bits", "limit"), [(8, 2.2), (4, 1.2)])
def test_bytes_per_parameter(bits, limit):
    params = parameters((256, 512), (512,))
    optimizer = train(params, gradients(params, 1), state_bits=bits)
    assert bytes_of(optimizer) / sum(p.numel() for p in params) < limit


@pytest.mark.parametrize(("bits", "tolerance"), [(8, 0.1), (4, 0.5)])
def test_the_weights_stay_near_those_of_full_states(bits, tolerance):
    small, full = parameters((64, 80)), parameters((64, 80))
    start = small[0].detach().clone()
    rows = gradients(small, 30, spike_every=7)
    train(small, rows, lr=1e-2, state_bits=bits)
    train(full, rows, lr=1e-2)
    moved = (full[0] - start).norm()
    assert (small[0] - full[0]).norm() / moved < tolerance


@both
def test_each_step_is_the_full_step_on_the_moments_as_they_are_stored(bits):
    params = parameters((64, 80))
    rows = gradients(params, 6, spike_every=3)
    optimizer = train(params, rows[:5], **OPTIONS, state_bits=bits)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    full = train(twins, [[torch.zeros_like(p) for p in twins]], **OPTIONS)
    for twin, param in zip(twins, params, strict=True):
        twin.data.copy_(param)
        for name, value in optimizer.state[param].items():
            full.state[twin][name].copy_(low_bit.read(value, torch.float32))
    train(params, rows[5:], optimizer)
    train(twins, rows[5:], full)
    torch.testing.assert_close(params[0], twins[0], rtol=1e-5, atol=2e-6)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resumed_run_is_the_same_run(bits, dtype):
    straight, half = parameters(*SHAPES, dtype=dtype), parameters(*SHAPES, dtype=dtype)
    rows = gradients(straight, 16, spike_every=4)
    expected = train(straight, rows, **OPTIONS, state_bits=bits)
    first = train(half, rows[:7], **OPTIONS, state_bits=bits)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    others = [torch.nn.Parameter(p.detach().clone()) for p in half]
    second = StableSPAM(others, **OPTIONS, state_bits=bits)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    train(others, rows[7:], second)
    assert all(torch.equal(a, b) for a, b in zip(others, straight, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(bits_of(second), bits_of(expected), strict=True))


@both
def test_a_pickled_optimizer_goes_on_alike(bits):
    params = parameters(*SHAPES)
    rows = gradients(params, 8)
    optimizer = train(params, rows[:4], **OPTIONS, state_bits=bits)
    twin = pickle.loads(pickle.dumps(optimizer))
    train([p for group in twin.param_groups for p in group["params"]], rows[4:], twin)
    train(params, rows[4:], optimizer)
    assert all(torch.equal(a, b) for a, b in zip(bits_of(twin), bits_of(optimizer), strict=True))


@both
def test_resetting_empties_the_moments(bits):
    params = parameters((64, 80))
    optimizer = train(params, gradients(params, 3), state_bits=bits)
    optimizer.reset_moments()
    assert all((moment == 0).all() for moment in moments_of(optimizer, params[0]))
    assert optimizer.state[params[0]]["moment_step"] == 0


def test_a_run_of_adamw_is_continued_in_8_bits():
    params = parameters((64, 80))
    adamw = train(params, gradients(params, 3), torch.optim.AdamW(params))
    optimizer = StableSPAM(params, state_bits=8)
    optimizer.load_state_dict(adamw.state_dict())
    stored, original = moments_of(optimizer, params[0])[0], adamw.state[params[0]]["exp_avg"]
    assert (stored - original).norm() / original.norm() < 0.02


@both
def test_adopted_second_moments_above_zero_stay_above_zero(bits):
    params = parameters((64, 80))
    row = torch.full((64, 80), 1e-6)
    row[:, 0] = 1.0
    adamw = train(params, [[row]], torch.optim.AdamW(params))
    optimizer = StableSPAM(params, state_bits=bits)
    optimizer.load_state_dict(adamw.state_dict())
    assert (moments_of(optimizer, params[0])[1] > 0).all()
    full = StableSPAM(params)  # and back into full moments
    full.load_state_dict(optimizer.state_dict() | {"param_groups": full.state_dict()["param_groups"]})
    assert torch.equal(full.state[params[0]]["exp_avg_sq"], moments_of(optimizer, params[0])[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_bits": 16}, "state_bits must be 4, 8 or 32, got 16; 32 keeps"),
        ({"state_bits": "8"}, "state_bits must be 4, 8 or 32, got '8'"),
        ({"state_bits": 8.0}, "state_bits must be 4, 8 or 32, got 8.0"),
        ({"state_bits": 8, "fused": True}, "fused must be None or False with state_bits=8, got True"),
        ({"state_bits": 4, "foreach": True}, "foreach must be None or False with state_bits=4, got True"),
        ({"state_bits": 8, "state_dtype": torch.bfloat16}, "state_dtype must be None with state_bits=8"),
    ],
    ids=str,
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        StableSPAM(parameters((3, 2)), **options)


def test_without_torchao_the_error_names_the_command(monkeypatch):
    for module in ("subclass_4bit", "subclass_8bit"):
        monkeypatch.setitem(sys.modules, f"torchao.optim.{module}", None)  # what makes its import fail
    StableSPAM(parameters((3, 2)))
    with pytest.raises(ImportError, match=r"state_bits=8 needs torchao; install it with: pip install .*\[lowbit\]"):
        StableSPAM(parameters((3, 2)), state_bits=8)


@both
@pytest.mark.parametrize("what", ["optimizer", "state dict"])
def test_a_deep_copy_goes_on_by_itself(bits, what):
    params = parameters(*SHAPES)
    rows = gradients(params, 6)
    optimizer = train(params, rows[:3], state_bits=bits, **OPTIONS)
    if what == "optimizer":
        twin = copy.deepcopy(optimizer)
    else:
        twin = StableSPAM([torch.nn.Parameter(param.detach().clone()) for param in params], state_bits=bits, **OPTIONS)
        twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = bits_of(twin)
    train(params, rows[3:], optimizer)
    assert all(torch.equal(*pair) for pair in zip(bits_of(twin), before, strict=True))
    train(twin.param_groups[0]["params"], rows[3:], twin)
    assert all(torch.equal(*pair) for pair in zip(bits_of(twin), bits_of(optimizer), strict=True))
