"""The Triton kernels against the reference and the loop: in Triton's interpreter, or on a GPU where there is one.

`tests/conftest.py` chooses the interpreter before anything imports triton.
"""

import gc

import pytest
import torch

from hf_stablespam.optim import StableSPAM
from hf_stablespam.optim import step as module
from hf_stablespam.optim.backends.loop import Loop
from hf_stablespam.optim.plan import Batch
from hf_stablespam.optim.stabilize.stabilizer import check_stabilize_options
from tests.optim.common import TOLERANCE, assert_identical, gradients, parameters, snapshot, train
from tests.optim.test_backends import fresh_trackers, spiked
from tests.reference.stable_spam import Hyperparameters, Reference

pytest.importorskip("triton", reason="triton is not installed: the kernels cannot run, not even interpreted")
from hf_stablespam.optim.backends import triton_kernels, triton_ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(37, 21), (), (130,), (3, 4, 5)]


@pytest.fixture(autouse=True)
def by_triton(monkeypatch):
    """Every step goes through the kernels, in small chunks."""
    monkeypatch.setattr(triton_kernels, "BLOCK", 128)
    monkeypatch.setattr(module, "choose_backend", lambda *_: triton_ops.TritonOps)


def on_device(*shapes, dtype=torch.float32):
    return [torch.nn.Parameter(p.detach().to(DEVICE)) for p in parameters(*shapes, dtype=dtype)]


def rows_on_device(params, steps, **options):
    cpu = [torch.nn.Parameter(p.detach().cpu()) for p in params]
    return [[grad.to(DEVICE) for grad in row] for row in gradients(cpu, steps, **options)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("maximize", [False, True])
def test_the_kernels_follow_the_reference(dtype, maximize):
    params = on_device(*SHAPES, dtype=dtype)
    rows = rows_on_device(params, 8, spike_every=3)
    options = {"lr": 1e-2, "weight_decay": 0.1, "reset_interval": 5, "decay_steps": 6}
    references = [Reference(p.cpu(), Hyperparameters(**options)) for p in params]
    optimizer = train(params, rows, maximize=maximize, state_dtype=torch.float32, **options)
    assert optimizer.statistics["clipped"].shape == (len(SHAPES),)
    rtol, atol = TOLERANCE[dtype]
    for index, reference in enumerate(references):
        for row in rows:
            reference.step((-row[index] if maximize else row[index]).cpu())
        torch.testing.assert_close(params[index].detach().cpu().double(), reference.weight, rtol=rtol, atol=8 * atol)


@pytest.mark.parametrize("options", [{}, {"clip_beta": None}, {"norm_betas": None}, {"reset_interval": 2}], ids=str)
def test_kernels_and_loop_agree_on_statistics_and_state(options, monkeypatch):
    params, twins = on_device(*SHAPES), on_device(*SHAPES)
    rows = rows_on_device(params, 4, spike_every=2)
    ours = train(params, rows, **options)
    monkeypatch.undo()
    loop = train(twins, rows, foreach=False, fused=False, **options)
    for name, value in loop.statistics.items():
        torch.testing.assert_close(ours.statistics[name], value, rtol=1e-5, atol=1e-7)
    for one, other in zip(snapshot(ours), snapshot(loop), strict=True):
        for name in other:
            torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_tensor_is_passed_over_and_the_gradient_left_alone(bad):
    params = on_device((37, 21), (5,))
    optimizer = train(params, rows_on_device(params, 2))
    before = snapshot(optimizer)
    (row,) = rows_on_device(params, 1)
    row[0][36, 20] = bad
    train(params, [row], optimizer)
    assert optimizer.statistics["nonfinite"].tolist() == [1, 0]
    assert_identical(snapshot(optimizer)[:1], before[:1])
    assert torch.equal(params[0].grad.nan_to_num(7.0), row[0].nan_to_num(7.0))


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e15])
def test_zeros_and_extremes(size):
    params = on_device((37, 21))
    optimizer = train(params, [[torch.full((37, 21), size, device=DEVICE)]] * 3)
    assert all(value.isfinite().all() for entry in snapshot(optimizer) for value in entry.values())
    expected = size * (37 * 21) ** 0.5
    assert optimizer.statistics["grad_norm"].item() == pytest.approx(expected, rel=1e-5)


def test_new_memory_is_noticed():
    params, twins = on_device((37, 21)), on_device((37, 21))
    rows = rows_on_device(params, 4)
    optimizer = StableSPAM(params)
    for row in rows:
        params[0].data = params[0].data.clone()
        optimizer.state.get(params[0], {}).update(
            {name: value.clone() for name, value in optimizer.state.get(params[0], {}).items()}
        )
        train(params, [row], optimizer)
    train(twins, rows)
    assert torch.equal(*params, *twins)


def test_stochastic_rounding_is_unbiased_and_seeded(monkeypatch):
    monkeypatch.setattr(triton_kernels, "BLOCK", 2048)  # the interpreter is slow with many programs

    def weight_after():
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.ones(32, 64, dtype=torch.bfloat16, device=DEVICE))
        train([weight], [[torch.ones_like(weight)]] * 4, lr=1e-3, stochastic_rounding=True)
        return weight.detach().double()

    first = weight_after()
    assert first.mean().item() == pytest.approx(1 - 4e-3, abs=5e-4)
    assert len(first.unique()) > 1
    assert torch.equal(first, weight_after())


@pytest.mark.parametrize("kind", ["calm", "one spike", "tiny", "zeros", "nan", "inf"])
def test_a_rescaled_gradient_is_that_of_the_loop(kind, monkeypatch):
    options = check_stabilize_options(0.9, (0.7, 0.9), 1e-8)
    ours, theirs = fresh_trackers(torch.float32), fresh_trackers(torch.float32)
    for number in range(3):
        grad = spiked(kind if number == 2 else "calm", (37, 21), torch.float32)
        with monkeypatch.context() as patched:
            patched.setattr(module, "choose_backend", lambda *_: Loop)
            ((expected, (wanted,)),) = module.rescale([(Batch([grad], [grad], [theirs]), options)])
        ((seen, (found,)),) = module.rescale([(Batch([grad], [grad], [ours]), options)])
        torch.testing.assert_close(seen.statistics, expected.statistics, equal_nan=True, rtol=1e-5, atol=0)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


def test_without_eps_an_entry_that_never_had_a_gradient_keeps_its_weight():
    params = on_device((37, 21))
    before, grad = params[0].detach().clone(), torch.ones(37, 21, device=DEVICE)
    grad[5:] = 0
    train(params, [[grad]] * 2, eps=0.0, lr=1e-2)
    assert torch.equal(params[0][5:], before[5:])
    assert not torch.equal(params[0][:5], before[:5])


def test_tables_live_as_long_as_the_tensors():
    gc.collect()
    held = len(triton_ops._SIZES)
    params = on_device((37, 21), (5,))
    train(params, rows_on_device(params, 3))
    assert len(triton_ops._SIZES) == len(triton_ops._ADDRESSES) == held + 1
    params.clear()
    gc.collect()
    assert len(triton_ops._SIZES) == held


def test_sizes_are_laid_out_once_and_addresses_when_they_change(monkeypatch):
    params = on_device((37, 21), (5,))
    optimizer = StableSPAM(params)
    (row,) = rows_on_device(params, 1)
    for param, grad in zip(params, row, strict=True):
        param.grad = grad
    optimizer.step()
    tables, addresses = triton_ops._SIZES[params[0]], triton_ops._ADDRESSES[params[0]]
    optimizer.step()
    assert triton_ops._ADDRESSES[params[0]] is addresses
    params[0].grad = params[0].grad.clone()
    optimizer.step()
    assert triton_ops._SIZES[params[0]] is tables
    assert triton_ops._ADDRESSES[params[0]] is not addresses
