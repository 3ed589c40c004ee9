"""`optim="stable_spam"` with `rank`, low-bit states, and updates during the backward pass, in the Trainer."""

import logging
from contextlib import nullcontext

import pytest
import torch
from transformers import TrainerCallback

from hf_stablespam import FourBitCallback, FourBitConfig, StableSPAM
from hf_stablespam.optim import LayerwiseStableSPAM
from hf_stablespam.trainer.registration.options.galore_groups import target_names
from hf_stablespam.trainer.registration.options.optim_args import parse_optim_args
from tests.trainer.helpers import optimizer_of, tiny_llama, tiny_trainer, training_logs

RANK = "rank=4,update_proj_gap=3,scale=0.5,reset_interval=5"


def trained(tmp_path, *, callbacks=(), resume=None, model=None, **overrides):
    trainer = tiny_trainer(tmp_path, callbacks=callbacks, model=model, **overrides)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def assert_equal_weights(left, right):
    for a, b in zip(left.model.parameters(), right.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_targets_are_projected_and_the_rest_is_not(tmp_path):
    trainer = trained(
        tmp_path, optim_args=RANK, optim_target_modules=["self_attn", "mlp"], weight_decay=0.1, max_steps=2
    )
    optimizer = optimizer_of(trainer)
    names = {param: name for name, param in trainer.model.named_parameters()}
    assert len(names) == sum(len(group["params"]) for group in optimizer.param_groups)
    for group in optimizer.param_groups:
        for param in group["params"]:
            is_target = "proj" in names[param]
            assert (group["rank"] == 4) == is_target, names[param]
            assert ("project_age" in optimizer.state[param]) == is_target
            assert group["weight_decay"] == (0.0 if "norm" in names[param] else 0.1)
    projected = next(g for g in optimizer.param_groups if g["rank"])
    assert (projected["update_proj_gap"], projected["scale"], projected["reset_interval"]) == (3, 0.5, 5)
    assert projected["decay_steps"] == 2


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", 15),
        ("all_linear", 15),
        (r".*\.mlp\..*", 6),
        (["q_proj", "v_proj"], 4),
        (["model.layers.1.mlp.up_proj"], 1),
    ],
    ids=str,
)
def test_targets_are_named_as_in_transformers(targets, expected):
    assert len(target_names(tiny_llama(), targets)) == expected


@pytest.mark.parametrize("bits", [32, 8])
def test_resuming_is_exact(tmp_path, bits):
    if bits == 8:
        pytest.importorskip("torchao.optim", reason="low-bit states are torchao's (extra lowbit)")
    options = {
        "optim_args": f"{RANK},state_bits={bits}",
        "optim_target_modules": "all-linear",
        "save_strategy": "steps",
        "save_steps": 6,
        "max_steps": 12,
    }

    def model():
        return tiny_llama(hidden_size=64, intermediate_size=1024)  # R of the MLP: 1024 x 4 entries

    straight = trained(tmp_path / "straight", model=model(), **options)
    checkpoint = str(tmp_path / "straight" / "checkpoint-6")
    assert_equal_weights(straight, trained(tmp_path / "resumed", model=model(), resume=checkpoint, **options))


def test_four_bit_layers_are_targets_too(tmp_path):
    four_bit = FourBitCallback(FourBitConfig(weight="int4", activation="int4"))
    trainer = trained(tmp_path, callbacks=[four_bit], optim_args=RANK, optim_target_modules=[r".*_proj"])
    assert sum("project_age" in state for state in optimizer_of(trainer).state.values()) == 14
    assert all(row["loss"] > 0 for row in training_logs(trainer))


def test_layerwise_is_the_same_training(tmp_path):
    options = {"optim_target_modules": "all-linear"}
    usual = trained(tmp_path, optim_args=RANK, **options)
    layerwise = trained(tmp_path, optim_args=f"{RANK},layerwise=true", **options)
    assert type(optimizer_of(layerwise)) is LayerwiseStableSPAM
    assert type(optimizer_of(usual)) is StableSPAM
    assert_equal_weights(usual, layerwise)


class Stop(TrainerCallback):
    """An error in the midst of training."""

    def on_step_end(self, args, state, control, **kwargs):
        raise RuntimeError("stop")


@pytest.mark.parametrize("breaks_off", [False, True], ids=["ended", "broken off"])
def test_another_trainer_trains_the_model_after_layerwise_updates(tmp_path, breaks_off):
    first = tiny_trainer(tmp_path, optim_args="layerwise=true", max_steps=2, callbacks=[Stop()] * breaks_off)
    with pytest.raises(RuntimeError, match="stop") if breaks_off else nullcontext():
        first.train()
    before = [param.detach().clone() for param in first.model.parameters()]
    second = trained(tmp_path, model=first.model, optim="adamw_torch", max_steps=2)
    assert len(optimizer_of(second).state) == len(before)
    assert not any(torch.equal(old, param) for old, param in zip(before, second.model.parameters(), strict=True))
    assert int(optimizer_of(first).state[next(first.model.parameters())]["step"]) == (1 if breaks_off else 2)


def test_training_again_with_layerwise_updates_goes_on(tmp_path):
    trainer = trained(tmp_path, optim_args="layerwise=true", max_steps=2)
    trainer.train()
    assert {int(state["step"]) for state in optimizer_of(trainer).state.values()} == {4}


def test_layerwise_resumes_exactly(tmp_path):
    options = {"optim_args": "layerwise=true", "save_strategy": "steps", "save_steps": 6, "max_steps": 12}
    straight = trained(tmp_path / "straight", **options)
    checkpoint = str(tmp_path / "straight" / "checkpoint-6")
    assert_equal_weights(straight, trained(tmp_path / "resumed", resume=checkpoint, **options))


@pytest.mark.parametrize(
    ("text", "expected", "line"),
    [
        ("update_proj_gap=7", {"reset_interval": 7}, "update_proj_gap=7 without rank is the official code's name for"),
        ("rank=4,update_proj_gap=7", {"rank": 4, "update_proj_gap": 7}, "update_proj_gap=7 beside rank is GaLore's"),
        ("update_proj_gap=7,rank=4", {"rank": 4, "update_proj_gap": 7}, "update_proj_gap=7 beside rank is GaLore's"),
    ],
)
def test_one_line_says_what_update_proj_gap_means(tmp_path, caplog, text, expected, line):
    assert parse_optim_args(text) == expected
    targets = "all-linear" if "rank" in text else None
    with caplog.at_level(logging.WARNING):
        tiny_trainer(tmp_path, optim_args=text, optim_target_modules=targets).create_optimizer()
    assert [line in record.getMessage() for record in caplog.records].count(True) == 1
