"""Learning rates apart: the groups they make, the rates that are trained with and logged, resuming, and refusals."""

import json
import logging

import pytest
import torch
from transformers import Trainer

from hf_stablespam import LearningRateScaleCallback
from tests.trainer.helpers import optimizer_of, tiny_llama, tiny_trainer, training_logs

EMBEDDING = "model.embed_tokens.weight"
OPTIMS = ["stable_spam", "spam", "adamw_torch", "adafactor", "sgd"]


def trained(folder, **overrides):
    trainer = tiny_trainer(folder, **overrides)
    trainer.train()
    return trainer


def groups_of(trainer) -> dict[str, dict]:
    """Name of a parameter → its group."""
    names = {id(param): name for name, param in trainer.model.named_parameters()}
    groups = optimizer_of(trainer).param_groups
    return {names[id(param)]: group for group in groups for param in group["params"]}


@pytest.mark.parametrize("optim", OPTIMS)
def test_any_optimizer_gets_groups_with_rates_and_keeps_weight_decay(tmp_path, optim):
    callback = LearningRateScaleCallback(embedding=10.0, head=3.0, norm=0.5)
    trainer = tiny_trainer(tmp_path, optim=optim, weight_decay=0.1, callbacks=[callback])
    plain = tiny_trainer(tmp_path, optim=optim, weight_decay=0.1)
    for each in (trainer, plain):
        each.create_optimizer_and_scheduler(6)
    found, usual = groups_of(trainer), groups_of(plain)
    assert found.keys() == usual.keys()
    factors = {EMBEDDING: 10.0, "lm_head.weight": 3.0}
    for name, group in found.items():
        factor = factors.get(name, 0.5 if "norm" in name else 1.0)
        assert group["initial_lr"] == pytest.approx(factor * usual[name]["initial_lr"])
        assert group["weight_decay"] == usual[name]["weight_decay"]
    assert [group["weight_decay"] for group in optimizer_of(trainer).param_groups[:2]] == [0.1, 0.0]


def test_optim_args_and_the_callback_do_the_same(tmp_path):
    scaled = trained(tmp_path, optim_args="embedding_lr_scale=10,reset_interval=3")
    called = trained(tmp_path, optim_args="reset_interval=3", callbacks=[LearningRateScaleCallback(embedding=10)])
    for one, other in zip(scaled.model.parameters(), called.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("optim", ["stable_spam", "sgd"])
def test_only_the_embedding_moves_further_and_the_base_rate_is_logged(tmp_path, optim):
    """SGD's step is the rate times the gradient: after one step the embedding has moved ten times as far."""
    start = dict(tiny_llama().state_dict())
    moved, logs = [], []
    for callbacks in ([], [LearningRateScaleCallback(embedding=10)]):
        trainer = trained(tmp_path, optim=optim, max_steps=1, callbacks=callbacks)
        moved.append({name: value - start[name] for name, value in trainer.model.state_dict().items()})
        logs.append([row["learning_rate"] for row in training_logs(trainer)])
    assert logs[0] == logs[1]
    for name in start:
        factor = 10 if name == EMBEDDING else 1
        torch.testing.assert_close(moved[1][name], factor * moved[0][name], rtol=1e-3, atol=1e-6)


def test_a_tied_head_counts_as_the_embedding(tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    trainer = tiny_trainer(tmp_path, model=model, callbacks=[LearningRateScaleCallback(embedding=4)])
    assert groups_of(trainer_with_optimizer(trainer))[EMBEDDING]["lr"] == 4e-3
    wrong = tiny_trainer(tmp_path, model=model, optim_args="head_lr_scale=4")
    with pytest.raises(ValueError, match="head_lr_scale must be left out, the head is tied to the embedding; use emb"):
        wrong.train()


def trainer_with_optimizer(trainer):
    trainer.create_optimizer()
    return trainer


@pytest.mark.parametrize("optim", ["stable_spam", "adamw_torch"])
def test_resuming_is_exact(tmp_path, optim):
    def prepared(folder):
        options = {"optim": optim, "save_strategy": "steps", "save_steps": 3}
        return tiny_trainer(tmp_path / folder, callbacks=[LearningRateScaleCallback(embedding=8)], **options)

    whole, again = prepared("whole"), prepared("again")
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)
    logs = json.loads((tmp_path / "whole/checkpoint-6/trainer_state.json").read_text())["log_history"]
    assert [row["learning_rate"] for row in logs] == [row["learning_rate"] for row in training_logs(again)]


def test_a_resume_with_another_scale_says_what_holds(tmp_path, caplog):
    saving = {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 3}
    trained(tmp_path, callbacks=[LearningRateScaleCallback(embedding=8)], **saving)
    other = tiny_trainer(tmp_path, callbacks=[LearningRateScaleCallback(embedding=5)], **saving)
    with caplog.at_level(logging.WARNING):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert "lr_scale of 5 counts for nothing" in caplog.text
    assert groups_of(other)[EMBEDDING]["lr_scale"] == 8


def test_a_second_train_goes_on_with_the_same_groups(tmp_path):
    trainer = trained(tmp_path, optim_args="embedding_lr_scale=10")
    count = len(optimizer_of(trainer).param_groups)
    trainer.train()
    assert len(optimizer_of(trainer).param_groups) == count == 3


def test_an_optimizer_that_was_given_is_set_apart_and_one_with_a_schedule_refused(tmp_path):
    model = tiny_llama()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scale = LearningRateScaleCallback(embedding=2)
    trainer = trained(tmp_path, model=model, optimizers=(optimizer, None), callbacks=[scale], optim="adamw_torch")
    assert groups_of(trainer)[EMBEDDING]["initial_lr"] == 2e-2
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    trainer = tiny_trainer(tmp_path, model=model, optimizers=(optimizer, schedule), callbacks=[scale])
    with pytest.raises(ValueError, match="before there is a schedule"):
        trainer.train()


def test_optim_args_beside_an_optimizer_that_was_given_are_said_to_count_for_nothing(tmp_path, caplog):
    """But for the scales. The Trainer reads `optim` for no such optimizer."""
    for optim_args, said in (("embedding_lr_scale=10,clip_beta=0.5", True), ("embedding_lr_scale=10", False)):
        caplog.clear()
        model = tiny_llama()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        options = {"max_steps": 1, "optim_args": optim_args, "optimizers": (optimizer, None)}
        trainer = trained(tmp_path, model=model, **options)
        assert groups_of(trainer)[EMBEDDING]["initial_lr"] == 1e-2
        assert ("optim=stable_spam and clip_beta in optim_args count for nothing" in caplog.text) == said
    caplog.clear()
    again = trained(tmp_path, max_steps=1, optim_args="clip_beta=0.5")
    again.train()
    assert "count for nothing" not in caplog.text


def test_a_trainer_that_builds_its_optimizer_itself_is_refused(tmp_path):
    class Own(Trainer):
        def create_optimizer(self, *args):
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-2)
            return self.optimizer

    for options in ({"optim_args": "norm_lr_scale=2"}, {"callbacks": [LearningRateScaleCallback(norm=2)]}):
        with pytest.raises(ValueError, match="norm_lr_scale=2 would count for nothing"):
            tiny_trainer(tmp_path, trainer_cls=Own, **options).train()


@pytest.mark.parametrize(
    ("optim_args", "message"),
    [
        ("embeding_lr_scale=3", r"unknown option 'embeding_lr_scale' \(did you mean 'embedding_lr_scale'"),
        ("embedding_lr_scale=0", "embedding_lr_scale must be a number > 0, got 0.0; leave it out"),
        ("embedding_lr_scale=none", "embedding_lr_scale must be a number, got 'none'"),
        ("matrix_lr_scale=3", "unknown option 'matrix_lr_scale'"),
    ],
)
def test_wrong_options_are_refused_when_arguments_are_made(tmp_path, optim_args, message):
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, optim_args=optim_args)


@pytest.mark.parametrize("wrong", [{}, {"embedding": 0}, {"head": "10"}, {"norm": float("inf")}])
def test_wrong_factors_are_refused(wrong):
    with pytest.raises(ValueError, match=r"number > 0|changes no learning rate"):
        LearningRateScaleCallback(**wrong)


def test_what_is_not_trained_or_asked_for_twice_is_refused(tmp_path):
    model = tiny_llama()
    model.get_input_embeddings().requires_grad_(False)
    with pytest.raises(ValueError, match="embedding_lr_scale must be left out, no embedding is trained"):
        tiny_trainer(tmp_path, model=model, optim_args="embedding_lr_scale=3").train()
    twice = tiny_trainer(tmp_path, optim_args="norm_lr_scale=3", callbacks=[LearningRateScaleCallback(norm=3)])
    with pytest.raises(ValueError, match="norm_lr_scale is set twice"):
        twice.train()


def test_galore_and_layerwise_updates_keep_their_groups(tmp_path):
    options = {"optim_args": "embedding_lr_scale=10,rank=4,update_proj_gap=2", "optim_target_modules": "all-linear"}
    whole = trained(tmp_path, **options)
    layerwise = trained(tmp_path, **{**options, "optim_args": options["optim_args"] + ",layerwise=true"})
    assert groups_of(whole)[EMBEDDING]["lr_scale"] == 10
    assert groups_of(whole)["model.layers.0.self_attn.q_proj.weight"]["rank"] == 4
    for one, other in zip(whole.model.parameters(), layerwise.model.parameters(), strict=True):
        assert torch.equal(one, other)
