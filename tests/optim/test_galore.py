"""GaLore: the projection, the whole against references and galore-torch, its state and its memory, bad input."""

import copy
import io
import logging

import pytest
import torch

from hf_stablespam.optim import StableSPAM
from hf_stablespam.optim.galore.projection import (
    PROJECTION_TYPES,
    principal_directions,
    project,
    project_back,
    projected_shape,
)
from hf_stablespam.optim.galore.step import projection_state
from hf_stablespam.optim.state import low_bit
from tests.optim.common import assert_identical, gradients, parameters, snapshot, train
from tests.reference.stable_spam import Hyperparameters, Reference

SHAPES = [(24, 10), (10, 24), (7,)]
GALORE = {"rank": 4, "update_proj_gap": 5, "scale": 0.5}
PLAIN = {"clip_beta": None, "norm_betas": None, "reset_interval": None}
types = pytest.mark.parametrize("proj_type", PROJECTION_TYPES)


def low_rank(shape, rank, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape[0], rank, generator=generator) @ torch.randn(rank, shape[1], generator=generator)


@types
@pytest.mark.parametrize("shape", [(24, 10), (10, 24), (12, 12)], ids=str)
def test_a_gradient_of_low_rank_survives_projection(proj_type, shape):
    grad = low_rank(shape, 4)
    sides = principal_directions(grad, 4, proj_type)
    low = project(grad, *sides)
    assert low.shape == projected_shape(torch.Size(shape), 4, proj_type)
    torch.testing.assert_close(project_back(low, *sides), grad, rtol=1e-4, atol=1e-4)
    for side, gram in zip(sides, ("ji,jk->ik", "ij,kj->ik"), strict=True):
        if side is not None:
            torch.testing.assert_close(torch.einsum(gram, side, side), torch.eye(4), rtol=0, atol=1e-5)


def test_the_side_is_chosen_by_the_shape():
    shapes = {
        kind: [tuple(projected_shape(torch.Size(s), 4, kind)) for s in ((24, 10), (10, 24))]
        for kind in PROJECTION_TYPES
    }
    assert shapes == {
        "std": [(24, 4), (4, 24)],
        "reverse_std": [(4, 10), (10, 4)],
        "left": [(4, 10), (4, 24)],
        "right": [(24, 4), (10, 4)],
        "full": [(4, 4), (4, 4)],
    }


# Not "full": there R is diagonal when the directions are new, and Adam makes whole steps of the rounding beside it.
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right"])
def test_plain_galore_is_galore_torch(proj_type):
    galore_torch = pytest.importorskip("galore_torch", reason="the oracle is galore-torch 1.0, with bitsandbytes")
    ours, theirs = parameters(*SHAPES), parameters(*SHAPES)
    rows = gradients(ours, 17)
    groups = [{"params": p[:2], **GALORE, "proj_type": proj_type} for p in (ours, theirs)]
    # its ε stands beside the uncorrected second moment, ours beside the corrected one
    common = {"lr": 1e-2, "eps": 1e-12}
    train(ours, rows, StableSPAM([groups[0], {"params": ours[2:]}], **common, **PLAIN))
    oracle = galore_torch.GaLoreAdamW([groups[1], {"params": theirs[2:]}], **common, no_deprecation_warning=True)
    train(theirs, rows, oracle)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@types
def test_it_is_the_reference_on_the_projected_gradient(proj_type):
    (weight,) = parameters((24, 10), dtype=torch.float64)
    rows = gradients([weight], 12, spike_every=4)
    method = {"lr": 1e-2, "reset_interval": 7, "decay_steps": 9}
    sides = principal_directions(rows[0][0], 4, proj_type)
    reference = Reference(torch.zeros(projected_shape(weight.shape, 4, proj_type)), Hyperparameters(**method))
    expected, before = weight.detach().clone(), reference.weight
    optimizer = StableSPAM([weight], **method, weight_decay=0.1, rank=4, scale=0.5, proj_type=proj_type)
    for row in rows:
        train([weight], [row], optimizer)
        after = reference.step(project(row[0], *sides))
        expected = expected * (1 - 1e-2 * 0.1) + 0.5 * project_back(after - before, *sides)
        before = after
        torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-10)


def test_new_directions_come_every_so_many_steps():
    (weight,) = parameters((24, 10))
    optimizer = StableSPAM([weight], **GALORE)
    seen = []
    for row in gradients([weight], 11):
        train([weight], [row], optimizer)
        seen.append(optimizer.state[weight]["project_right"].clone())
    changes = [step for step in range(1, 11) if not torch.equal(seen[step], seen[step - 1])]
    assert changes == [5, 10]


def test_adaclip_starts_anew_with_the_directions_and_the_rest_goes_on():
    (weight,) = parameters((24, 10))
    optimizer = StableSPAM([weight], **GALORE, lr=1e-3)
    for step, row in enumerate(gradients([weight], 10)):
        train([weight], [row], optimizer)
        statistics, state = optimizer.statistics, optimizer.state[weight]
        assert state["step"] == state["moment_step"] == step + 1
        if step % 5 == 0:  # the mean of one entry is the entry: nothing is above it
            torch.testing.assert_close(statistics["clip_threshold"], statistics["grad_max"])
            assert statistics["clipped"] == 0
        else:
            assert (statistics["clip_threshold"] - statistics["grad_max"]).abs() > 1e-4 * statistics["grad_max"]


def test_a_switch_resets_the_moments_on_request():
    (weight,) = parameters((24, 10))
    optimizer = StableSPAM([weight], **GALORE, reset_on_switch=True)
    train([weight], gradients([weight], 7), optimizer)
    assert optimizer.state[weight]["moment_step"] == 2
    assert optimizer.state[weight]["step"] == 7


@pytest.mark.parametrize("when", [0, 5, 3])
def test_a_nonfinite_gradient_changes_nothing_and_is_not_decomposed(when, monkeypatch):
    decompose = torch.linalg.svd

    def finite_only(matrix, **options):
        assert matrix.isfinite().all()
        return decompose(matrix, **options)

    monkeypatch.setattr(torch.linalg, "svd", finite_only)
    (weight,) = parameters((24, 10))
    rows = gradients([weight], 8)
    rows[when][0][2, 2] = torch.inf
    optimizer = train([weight], rows[:when], StableSPAM([weight], **GALORE))
    before = weight.detach().clone()
    train([weight], rows[when : when + 1], optimizer)
    assert torch.equal(weight, before)
    assert optimizer.statistics["nonfinite"] == 1
    train([weight], rows[when + 1 :], optimizer)
    assert weight.isfinite().all()
    assert optimizer.state[weight]["step"] == 7
    # a gradient that was due for new directions leaves them to the next one
    assert optimizer.state[weight]["project_age"] == {0: 1, 5: 1, 3: 1}[when]


@pytest.mark.parametrize("when", [3, 5])
def test_a_gradient_whose_squared_norm_overflows_changes_nothing(when):
    (weight,) = parameters((24, 10))
    rows = gradients([weight], 8)
    optimizer = train([weight], rows[:when], StableSPAM([weight], **GALORE, reset_on_switch=True))
    before = snapshot(optimizer)
    train([weight], [[rows[when][0] * 1e38]], optimizer)
    assert optimizer.statistics["nonfinite"] == 1
    assert_identical(snapshot(optimizer), before)


def test_gradients_are_not_changed():
    (weight,) = parameters((24, 10))
    optimizer = StableSPAM([weight], **GALORE)
    for (grad,) in gradients([weight], 3, spike_every=2):
        before = grad.clone()
        weight.grad = grad
        optimizer.step()
        assert torch.equal(weight.grad, before)


def test_only_matrices_of_the_group_are_projected():
    matrix, vector, other = parameters((24, 10), (24,), (24, 10))
    optimizer = StableSPAM([{"params": [matrix, vector], "rank": 4}, {"params": [other]}])
    train([matrix, vector, other], gradients([matrix, vector, other], 1), optimizer)
    shapes = [tuple(optimizer.state[p]["exp_avg"].shape) for p in (matrix, vector, other)]
    assert shapes == [(24, 4), (24,), (24, 10)]


@types
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resumed_run_is_the_same_run(proj_type, dtype):
    options = {**GALORE, "proj_type": proj_type, "reset_interval": 6, "lr": 1e-2}
    straight, half = parameters(*SHAPES, dtype=dtype), parameters(*SHAPES, dtype=dtype)
    rows = gradients(straight, 14, spike_every=4)
    expected = snapshot(train(straight, rows, StableSPAM(straight, **options)))
    first = train(half, rows[:8], StableSPAM(half, **options))
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    others = [torch.nn.Parameter(p.detach().clone()) for p in half]
    second = StableSPAM(others, **options)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    train(others, rows[8:], second)
    assert_identical(snapshot(second), expected)


@pytest.mark.parametrize("bits", [8, 4])
def test_low_bit_states_combine(bits):
    pytest.importorskip("torchao.optim", reason="low-bit states are torchao's (extra lowbit)")
    small, full = parameters((64, 512)), parameters((64, 512))
    rows = gradients(small, 8)
    options = {"rank": 16, "update_proj_gap": 3, "lr": 1e-2}
    optimizer = train(small, rows[:5], StableSPAM(small, **options, state_bits=bits))
    assert low_bit.is_low_bit(optimizer.state[small[0]]["exp_avg"])
    start = full[0].detach().clone()
    train(full, rows, StableSPAM(full, **options))
    others = [torch.nn.Parameter(p.detach().clone()) for p in small]
    resumed = StableSPAM(others, **options, state_bits=bits)
    resumed.load_state_dict(optimizer.state_dict())
    train(small, rows[5:], optimizer)
    train(others, rows[5:], resumed)
    assert torch.equal(small[0], others[0])
    assert (small[0] - full[0]).norm() < {8: 0.1, 4: 0.5}[bits] * (full[0] - start).norm()


def test_the_state_holds_tensors_only():
    params = parameters(*SHAPES)
    optimizer = train(params, gradients(params, 2), StableSPAM(params, **GALORE))
    for state in copy.deepcopy(optimizer.state_dict())["state"].values():
        assert all(type(value) is torch.Tensor for value in state.values())


def test_its_memory_is_that_of_the_projection():
    (weight,) = parameters((256, 64))
    optimizer = train([weight], gradients([weight], 1), StableSPAM([weight], rank=16))
    held = sum(value.numel() for value in optimizer.state[weight].values())
    assert held == 2 * 256 * 16 + 16 * 64 + sum(v.dim() == 0 for v in optimizer.state[weight].values())


def test_a_rank_too_large_is_clamped_with_one_warning(caplog):
    params = parameters((24, 10), (9, 30), (24, 24))
    with caplog.at_level(logging.WARNING):
        optimizer = train(params, gradients(params, 2), StableSPAM(params, rank=12))
    (record,) = caplog.records
    assert "rank=12 is above the smaller side of 2 of the group's matrices, such as (24, 10)" in record.getMessage()
    assert optimizer.state[params[0]]["exp_avg"].shape == (24, 10)
    assert projection_state(params[1], {"rank": 12, "proj_type": "std"})["project_left"].shape == (9, 9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be a whole number >= 1, got 0; None switches the projection off"),
        ({"rank": -4}, "rank must be a whole number >= 1, got -4"),
        ({"rank": 4.0}, "rank must be a whole number >= 1, got 4.0"),
        ({"rank": 4, "update_proj_gap": 0}, "update_proj_gap must be a whole number of steps >= 1, got 0; 200"),
        ({"rank": 4, "scale": 0}, r"scale must be a number > 0, got 0; 0\.25 is GaLore's"),
        ({"rank": 4, "proj_type": "both"}, "proj_type must be one of std, reverse_std, left, right, full, got 'both'"),
        ({"rank": 4, "reset_on_switch": 1}, "reset_on_switch must be True or False, got 1"),
        ({"rank": 4, "fused": True}, "fused must be None or False with rank=4, got True"),
        ({"rank": 4, "foreach": True}, "foreach must be None or False with rank=4, got True"),
    ],
    ids=str,
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        StableSPAM(parameters((8, 6)), **options)
    with pytest.raises(ValueError, match=message):
        StableSPAM([{"params": parameters((8, 6)), **options}])


def test_a_rank_without_a_matrix_is_an_error():
    optimizer = StableSPAM(parameters((8, 6)))
    with pytest.raises(ValueError, match="rank=4 needs a 2-dimensional parameter in its group"):
        optimizer.add_param_group({"params": parameters((8,)), "rank": 4})
    assert len(optimizer.param_groups) == 1


def test_a_state_of_another_kind_is_refused_by_name():
    params = parameters((24, 10))
    adamw = train(params, gradients(params, 1), torch.optim.AdamW(params))
    with pytest.raises(ValueError, match=r"parameter 0 must hold project_right of shape \(4, 10\), got none; it was"):
        StableSPAM(params, **GALORE).load_state_dict(adamw.state_dict())
