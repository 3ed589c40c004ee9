"""The reference of the official code's behaviour reproduces what the official code gave."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.reference.official_stable_spam import OfficialStableSPAM

DATA = Path(__file__).parents[1] / "data"


@pytest.mark.parametrize("name", ["no_reset", "reset", "reset_decay_wd"])
def test_reproduces_the_recorded_trajectory(name):
    with safe_open(str(DATA / f"{name}.safetensors"), "pt") as file:
        options = json.loads(file.metadata()["hyperparameters"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, the file is no mapping
    count = sum(key.startswith("param.") for key in tensors)
    params = [torch.nn.Parameter(tensors[f"param.{i}"].clone()) for i in range(count)]
    optimizer = OfficialStableSPAM(
        params,
        lr=options["lr"],
        betas=tuple(options["betas"]),
        eps=options["eps"],
        weight_decay=options["weight_decay"],
        clip_beta=options["gamma3"],
        norm_betas=(options["gamma1"], options["gamma2"]),
        reset_interval=options["reset_interval"],
        decay=options["total_steps"],
    )
    for step in range(len(tensors["grads.0"])):
        for i, param in enumerate(params):
            param.grad = tensors[f"grads.{i}"][step].clone()
        optimizer.step()
        for i, param in enumerate(params):
            torch.testing.assert_close(param.detach(), tensors[f"official.{i}"][step], rtol=0, atol=1e-10)
