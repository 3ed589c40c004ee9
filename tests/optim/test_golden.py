"""`StableSPAM` reproduces the trajectories of the specification, and parts from the official code where it should."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from hf_stablespam.optim import StableSPAM
from tests.reference.stable_spam import Hyperparameters, Reference

DATA = Path(__file__).parents[1] / "data"
FILES = ["no_reset", "reset", "reset_decay_wd"]


def load(name):
    with safe_open(DATA / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        saved = json.loads(file.metadata()["hyperparameters"])
    options = {
        "lr": saved["lr"],
        "betas": tuple(saved["betas"]),
        "eps": saved["eps"],
        "weight_decay": saved["weight_decay"],
        "clip_beta": saved["gamma3"],
        "norm_betas": (saved["gamma1"], saved["gamma2"]),
        "reset_interval": saved["reset_interval"] or None,
        "decay_steps": saved["total_steps"],
    }
    return tensors, options


def trajectories(tensors, options):
    """Every parameter after every step."""
    params = [torch.nn.Parameter(tensors[f"param.{i}"].clone()) for i in range(3)]
    optimizer = StableSPAM(params, **options)
    history = [[] for _ in params]
    for step in range(len(tensors["grads.0"])):
        for i, param in enumerate(params):
            param.grad = tensors[f"grads.{i}"][step].clone()
        optimizer.step()
        for i, param in enumerate(params):
            history[i].append(param.detach().clone())
    return [torch.stack(steps) for steps in history]


@pytest.mark.parametrize("name", FILES)
def test_golden_trajectories_are_reproduced(name):
    tensors, options = load(name)
    for i, ours in enumerate(trajectories(tensors, options)):
        torch.testing.assert_close(ours, tensors[f"paper.{i}"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", FILES)
def test_the_slow_reference_reproduces_them_too(name):
    tensors, options = load(name)
    for i in range(3):
        reference = Reference(tensors[f"param.{i}"], Hyperparameters(**options))
        ours = torch.stack([reference.step(grad) for grad in tensors[f"grads.{i}"]])
        torch.testing.assert_close(ours, tensors[f"paper.{i}"], rtol=0, atol=1e-10)


def test_the_official_code_agrees_until_the_first_reset_only():
    tensors, options = load("reset")
    first = options["reset_interval"] - 1
    for i, ours in enumerate(trajectories(tensors, options)):
        official = tensors[f"official.{i}"]
        torch.testing.assert_close(ours[:first], official[:first], rtol=0, atol=1e-10)
        assert (ours[first:] - official[first:]).abs().max() > 1e-4
