"""Resetting the moments of optimizers that are not ours."""

import pytest
import torch
from torch.optim import Adafactor as TorchAdafactor
from transformers.optimization import Adafactor

from hf_stablespam import StableSPAM
from hf_stablespam.trainer.callbacks.helpers.moments import keeps_moments, reset_moments


def bitsandbytes_optimizer(name, params):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: see `make test-versions`")
    return getattr(bitsandbytes.optim, name)(params, lr=1e-2)


def torchao_optimizer(params):
    torchao = pytest.importorskip("torchao.optim", reason="torchao is not installed: it is in the extra lowbit")
    return torchao.AdamW8bit(params, lr=1e-2, block_size=64)


OPTIMIZERS = {
    "stable_spam": lambda params: StableSPAM(params, lr=1e-2, clip_beta=None, norm_betas=None, reset_interval=None),
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2),
    "adamw_foreach": lambda params: torch.optim.AdamW(params, lr=1e-2, foreach=True),
    "adamw_fused": lambda params: torch.optim.AdamW(params, lr=1e-2, fused=True),
    "adamw_capturable_lr": lambda params: torch.optim.AdamW(params, lr=torch.tensor(1e-2), foreach=False),
    "amsgrad": lambda params: torch.optim.AdamW(params, lr=1e-2, amsgrad=True),
    "nadam": lambda params: torch.optim.NAdam(params, lr=1e-2),
    "radam": lambda params: torch.optim.RAdam(params, lr=1e-2),
    "adamax": lambda params: torch.optim.Adamax(params, lr=1e-2),
    "sgd_momentum": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9),
    "adafactor": lambda params: Adafactor(params, lr=1e-2, scale_parameter=False, relative_step=False),
    "adafactor_beta1": lambda params: Adafactor(params, lr=1e-2, beta1=0.9, scale_parameter=False, relative_step=False),
    "torch_adafactor": lambda params: TorchAdafactor(params, lr=1e-2),
    "bitsandbytes_8bit": lambda params: bitsandbytes_optimizer("AdamW8bit", params),
    "bitsandbytes_32bit": lambda params: bitsandbytes_optimizer("AdEMAMix", params),
    "torchao_8bit": lambda params: torchao_optimizer(params),
}


@pytest.fixture(autouse=True)
def _eager():
    """torchao compiles its update, which takes longer than all of these tests."""
    with torch.compiler.set_stance("force_eager"):
        yield


def steps(weight, optimizer, seed, count=3):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_after_a_reset_it_goes_on_like_a_fresh_optimizer(name):
    weight = torch.nn.Parameter(torch.randn(64, 128))
    optimizer = OPTIMIZERS[name]([weight])
    steps(weight, optimizer, seed=1)
    reset_moments(optimizer)

    twin = torch.nn.Parameter(weight.detach().clone())
    fresh = OPTIMIZERS[name]([twin])
    steps(weight, optimizer, seed=2)
    steps(twin, fresh, seed=2)
    assert keeps_moments(fresh)
    assert torch.equal(weight, twin)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_the_reset_it_would_not(name):
    weight = torch.nn.Parameter(torch.randn(64, 128))
    optimizer = OPTIMIZERS[name]([weight])
    steps(weight, optimizer, seed=1)

    twin = torch.nn.Parameter(weight.detach().clone())
    steps(weight, optimizer, seed=2)
    steps(twin, OPTIMIZERS[name]([twin]), seed=2)
    assert not torch.equal(weight, twin)


@pytest.mark.parametrize(
    "optimizer_cls", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.Rprop, torch.optim.ASGD, torch.optim.RMSprop]
)
def test_optimizers_without_moments_are_told_apart(optimizer_cls):
    assert not keeps_moments(optimizer_cls([torch.nn.Parameter(torch.zeros(2))], lr=1e-2))


def test_before_the_first_step_there_is_nothing_to_do():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])
    reset_moments(optimizer)
    assert not optimizer.state
