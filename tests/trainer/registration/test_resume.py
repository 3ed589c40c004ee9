"""A resume says what of the checkpoint holds, and refuses one of other parameters by their names."""

import logging

import pytest
import torch
from transformers import TrainerCallback

from hf_stablespam import SPAM, MomentumResetCallback, StableSPAM
from hf_stablespam.trainer.callbacks.helpers.unwrapping import unwrap
from tests.trainer.helpers import optimizer_of, tiny_llama, tiny_trainer

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}


def model_without(*frozen):
    model = tiny_llama()
    for name, param in model.named_parameters():
        param.requires_grad = not any(part in name for part in frozen)
    return model


def checkpoint(tmp_path, **options):
    tiny_trainer(tmp_path, **SAVING, **options).train()
    return str(tmp_path / "checkpoint-2")


def resume(tmp_path, path, **options):
    trainer = tiny_trainer(tmp_path / "resumed", max_steps=4, **options)
    trainer.train(resume_from_checkpoint=path)
    return trainer


def said(caplog):
    return [record.getMessage() for record in caplog.records if "of the checkpoint hold" in record.getMessage()]


def test_options_that_are_not_those_of_the_checkpoint(tmp_path, caplog):
    path = checkpoint(tmp_path, optim_args="reset_interval=3,norm_betas=none", weight_decay=0.1)
    options = {
        "optim_args": "clip_beta=0.9,state_bits=8",
        "adam_beta1": 0.8,
        "learning_rate": 5e-4,
        "weight_decay": 0.2,
    }
    with caplog.at_level(logging.WARNING, logger="hf_stablespam"):
        trainer = resume(tmp_path, path, **options)
    (message,) = said(caplog)
    for part in (
        "reset_interval=3 holds (1000 was given)",
        "norm_betas=None holds ((0.7, 0.9) was given)",
        "clip_beta=0.999 holds (0.9 was given)",
        "state_bits=32 holds (8 was given)",
        "adam_beta1 and adam_beta2=(0.9, 0.999) holds ((0.8, 0.999) was given)",
        "learning_rate=0.001 holds (0.0005 was given)",
        "weight_decay=0.1 holds (0.2 was given)",
    ):
        assert part in message
    assert message.count("holds") == 7
    assert {group["state_bits"] for group in optimizer_of(trainer).param_groups} == {32}
    assert {group["clip_beta"] for group in optimizer_of(trainer).param_groups} == {0.999}


def test_the_same_options_need_no_words(tmp_path, caplog):
    path = checkpoint(tmp_path, optim_args="reset_interval=3", lr_scheduler_type="cosine")
    with caplog.at_level(logging.WARNING, logger="hf_stablespam"):
        resume(tmp_path, path, optim_args="reset_interval=3", lr_scheduler_type="cosine")
    assert not said(caplog)


def test_an_interval_that_a_callback_owns_is_nobodys_option(tmp_path, caplog):
    path = checkpoint(tmp_path)
    with caplog.at_level(logging.WARNING, logger="hf_stablespam"):
        resume(tmp_path, path, callbacks=[MomentumResetCallback(every=3)])
    assert not said(caplog)


def test_options_against_those_of_adamw(tmp_path, caplog):
    path = checkpoint(tmp_path, optim="adamw_torch", adam_epsilon=1e-6)
    with caplog.at_level(logging.WARNING, logger="hf_stablespam"):
        resume(tmp_path, path)
    assert "hold, not those of this run: adam_epsilon=1e-06 holds (1e-08 was given); to" in said(caplog)[0]


@pytest.mark.parametrize("optim", ["stable_spam", "spam"])
def test_a_checkpoint_of_sgd_is_refused(tmp_path, optim):
    path = checkpoint(tmp_path, optim="sgd")
    with pytest.raises(
        ValueError, match=r"must be of an optimizer with moments, got .*options .*lr, momentum, dampening"
    ):
        resume(tmp_path, path, optim=optim)


@pytest.mark.parametrize("cls", [StableSPAM, SPAM])
def test_a_state_from_before_the_first_step_is_none_of_sgds(cls):
    weight = torch.nn.Parameter(torch.ones(2))
    cls([weight]).load_state_dict(cls([weight]).state_dict())
    with pytest.raises(ValueError, match="saved by another optimizer"):
        cls([weight]).load_state_dict(torch.optim.SGD([weight], lr=0.1).state_dict())


def test_parameters_that_are_not_trained_any_more(tmp_path):
    path = checkpoint(tmp_path)
    with pytest.raises(
        ValueError, match=r"is of 21 parameters, and this run trains 12; not trained now: model\.layers\.0\."
    ):
        resume(tmp_path, path, model=model_without("layers.0"))


def test_as_many_other_parameters_of_the_same_shapes(tmp_path):
    """torch loads them without a word, each with the moments of another."""
    path = checkpoint(tmp_path, model=model_without("layers.0"))
    with pytest.raises(
        ValueError, match=r"and this run trains 12; not trained now: model\.layers\.1\..* and 3 more; not in the "
    ):
        resume(tmp_path, path, model=model_without("layers.1"))


class AddsGroup(TrainerCallback):
    """What frees layers one after the other does this."""

    def on_train_end(self, args, state, control, optimizer, **kwargs):
        unwrap(optimizer).add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})


def test_a_callback_may_add_parameters_although_checkpoints_have_names(tmp_path):
    path = checkpoint(tmp_path, callbacks=[AddsGroup()])
    groups = torch.load(f"{path}/optimizer.pt", weights_only=True)["param_groups"]
    assert [group["param_names"][0] for group in groups] == [
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
    ]
    optimizer = optimizer_of(resume(tmp_path, path, callbacks=[AddsGroup()]))
    assert [len(group["params"]) for group in optimizer.param_groups] == [16, 5, 1]
    assert "param_names" not in optimizer.state_dict()["param_groups"][-1]  # it is not the model's


@pytest.mark.parametrize("optim", ["stable_spam", "adamw_torch"])
def test_checkpoints_without_names_are_told_by_shapes(tmp_path, optim):
    path = checkpoint(tmp_path, optim=optim)
    file = f"{path}/optimizer.pt"
    saved = torch.load(file, weights_only=True)
    for group in saved["param_groups"]:
        group.pop("param_names", None)
    torch.save(saved, file)
    message = (
        r"is of 21 parameters, in groups of \[16, 5\], and this run trains 19, in groups of \[14, 5\]; "
        r"not trained now, and of a shape that the checkpoint has more of: model\.embed_tokens\.weight, "
        r"lm_head\.weight; train the same"
    )
    with pytest.raises(ValueError, match=message):
        resume(tmp_path, path, model=model_without("embed_tokens", "lm_head"))
