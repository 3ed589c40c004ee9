"""With every part switched off, `StableSPAM` is `torch.optim.AdamW`, bit for bit."""

import pytest
import torch

from hf_stablespam.optim import StableSPAM
from tests.optim.common import PATHS, gradients, parameters, train

OFF = {"clip_beta": None, "norm_betas": None, "reset_interval": None}


@pytest.mark.parametrize("choice", [{}, *PATHS.values()], ids=["default", *PATHS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("maximize", [False, True])
def test_all_parts_off_is_adamw_bit_for_bit(choice, dtype, maximize):
    ours, theirs = (parameters((33, 20), (7,), (), (2, 3, 4), dtype=dtype) for _ in range(2))
    rows = gradients(ours, 10, spike_every=4)
    common = {"lr": 3e-3, "betas": (0.8, 0.99), "eps": 1e-7, "weight_decay": 0.1, "maximize": maximize, **choice}
    optimizer = train(ours, rows, **common, **OFF)
    reference = train(theirs, rows, torch.optim.AdamW(theirs, **common))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
        for name in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(optimizer.state[a][name], reference.state[b][name])


def test_the_defaults_are_adamws_but_for_weight_decay():
    ours, theirs = parameters((33, 20)), parameters((33, 20))
    rows = gradients(ours, 5)
    train(ours, rows, **OFF)
    train(theirs, rows, torch.optim.AdamW(theirs, weight_decay=0.0))
    assert torch.equal(*ours, *theirs)


def test_a_non_finite_gradient_is_passed_over_here_too():
    good, bad = parameters((3, 2), (3, 2))
    optimizer = StableSPAM([good, bad], **OFF)
    before = bad.detach().clone()
    train([good, bad], [[torch.ones(3, 2), torch.full((3, 2), torch.nan)]], optimizer)
    assert torch.equal(bad, before)
    assert not torch.equal(good, before)
    assert optimizer.statistics["nonfinite"].tolist() == [0, 1]
    assert optimizer.state[bad]["step"] == 0


@pytest.mark.parametrize("choice", [{}, *PATHS.values()], ids=["default", *PATHS])
def test_the_learning_rate_may_be_a_tensor(choice):
    ours, theirs = parameters((33, 20), (7,), ()), parameters((33, 20), (7,), ())
    rows = gradients(ours, 3)
    train(ours, rows, lr=torch.tensor(3e-3), **choice, **OFF)
    train(theirs, rows, torch.optim.AdamW(theirs, lr=3e-3, weight_decay=0.0))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
