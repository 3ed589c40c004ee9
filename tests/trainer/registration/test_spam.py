"""`optim="spam"` in the Trainer."""

import inspect
import logging

import pytest
import torch
from transformers import HfArgumentParser, TrainingArguments

from hf_stablespam import SPAM, GradientNormCallback, MomentumResetCallback
from hf_stablespam.trainer.registration.options.lr_scales import OPTIONS as LR_SCALES
from hf_stablespam.trainer.registration.options.optim_args import SPAM as NAME
from hf_stablespam.trainer.registration.options.optim_args import option_table, parse_optim_args
from tests.trainer.helpers import optimizer_of, tiny_trainer, training_logs

OPTIM_ARGS = "density=0.5, reset_interval=4, clip_delay=1, threshold=20, warmup_steps=2"


def test_it_trains_with_what_the_arguments_say(tmp_path):
    trainer = tiny_trainer(
        tmp_path, optim="spam", optim_args=OPTIM_ARGS, adam_epsilon=1e-6, callbacks=[GradientNormCallback()]
    )
    trainer.train()
    group = optimizer_of(trainer).param_groups[0]
    assert type(optimizer_of(trainer)) is SPAM
    assert (group["density"], group["reset_interval"], group["threshold"], group["eps"]) == (0.5, 4, 20, 1e-6)
    assert [row["gradients/resets"] for row in training_logs(trainer)] == [0, 0, 0, 1, 0, 0]
    assert any("mask" in state for state in optimizer_of(trainer).state.values())


def test_resuming_is_exact(tmp_path):
    def run(folder, resume=None):
        saving = {"save_strategy": "steps", "save_steps": 6, "max_steps": 12}
        trainer = tiny_trainer(tmp_path / folder, optim="spam", optim_args=OPTIM_ARGS, **saving)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    straight = run("straight")
    resumed = run("resumed", str(tmp_path / "straight" / "checkpoint-6"))
    for a, b in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_command_line_knows_the_name(tmp_path):
    parser = HfArgumentParser(TrainingArguments)
    (args,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--optim", "spam"])
    assert args.optim == "spam"


def test_every_keyword_of_the_optimizer_is_an_option():
    keyword_only = {
        name
        for name, parameter in inspect.signature(SPAM).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    assert set(option_table(NAME)) - set(LR_SCALES) == keyword_only
    assert parse_optim_args("DeltaT=300,warmup_epoch=10", NAME) == {"reset_interval": 300, "warmup_steps": 10}


def test_options_of_stable_spam_are_unknown(tmp_path):
    with pytest.raises(ValueError, match="unknown option 'clip_beta'"):
        tiny_trainer(tmp_path, optim="spam", optim_args="clip_beta=0.9").create_optimizer()


def test_resets_have_one_owner(tmp_path):
    trainer = tiny_trainer(tmp_path, optim="spam", callbacks=[MomentumResetCallback(every=2)])
    trainer.train()
    assert optimizer_of(trainer).param_groups[0]["reset_interval"] is None
    assert {int(state["resets"]) for state in optimizer_of(trainer).state.values()} == {3}


def test_the_trainers_own_clipping_is_warned_of(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        tiny_trainer(tmp_path, optim="spam", max_grad_norm=1.0).create_optimizer()
    assert "max_grad_norm=1.0 clips the whole gradient before SPAM sees it" in caplog.text
