"""The optimizer that the Trainer builds for `optim="stable_spam"`."""

import logging

import pytest
import torch
from transformers import Trainer

from hf_stablespam import StableSPAM
from tests.trainer.helpers import arguments, optimizer_of, tiny_trainer, training_logs


def test_values_come_from_the_training_arguments(tmp_path):
    args = arguments(
        tmp_path,
        learning_rate=2e-3,
        adam_beta1=0.8,
        adam_beta2=0.95,
        adam_epsilon=1e-6,
        optim_args="norm_betas=none,reset_interval=7,decay_steps=9",
    )
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
    assert cls is StableSPAM
    assert kwargs == {
        "lr": 2e-3,
        "betas": (0.8, 0.95),
        "eps": 1e-6,
        "norm_betas": None,
        "reset_interval": 7,
        "decay_steps": 9,
    }


def test_other_optimizers_are_left_alone(tmp_path):
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path, optim="sgd"))
    assert cls is torch.optim.SGD
    assert kwargs == {"lr": 1e-3}


def test_weight_decay_groups_are_the_trainers(tmp_path):
    trainer = tiny_trainer(tmp_path, weight_decay=0.1)
    groups = trainer.create_optimizer().param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    assert {names[id(p)].split(".")[-2] for p in groups[1]["params"]} == {
        "input_layernorm",
        "post_attention_layernorm",
        "norm",
    }


def test_global_clipping_is_warned_about(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="hf_stablespam"):
        tiny_trainer(tmp_path, max_grad_norm=0.0).create_optimizer()
        assert not caplog.records
        tiny_trainer(tmp_path, max_grad_norm=1.0).create_optimizer()
    (record,) = caplog.records
    assert "max_grad_norm=1.0 clips the whole gradient before Stable-SPAM sees it" in record.getMessage()
    assert "Set max_grad_norm=0" in record.getMessage()


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_checkpoint_resumes_bit_for_bit(tmp_path, max_grad_norm):
    options = {
        "max_steps": 20,
        "save_strategy": "steps",
        "save_steps": 10,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.1,
        "max_grad_norm": max_grad_norm,
        "optim_args": "reset_interval=6",
    }
    straight = tiny_trainer(tmp_path / "straight", **options)
    straight.train()
    resumed = tiny_trainer(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-10"))

    for (name, expected), got in zip(straight.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(expected, got), name
    expected, got = (optimizer_of(trainer).state_dict() for trainer in (straight, resumed))
    assert expected["param_groups"] == got["param_groups"]
    assert expected["state"].keys() == got["state"].keys()
    for index, state in expected["state"].items():
        for name, value in state.items():
            assert torch.equal(value, got["state"][index][name]), (index, name)
    assert [row["loss"] for row in training_logs(straight)] == [row["loss"] for row in training_logs(resumed)]
