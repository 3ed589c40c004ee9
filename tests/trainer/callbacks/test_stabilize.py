"""StabilizeCallback: the Trainer's optimizer, whichever it is, sees stabilised gradients, also after a resume."""

import logging

import pytest
import torch

from hf_stablespam import GradientNormCallback, MomentumResetCallback, StabilizeCallback, stabilize
from tests.trainer.helpers import optimizer_of, tiny_llama, tiny_trainer, training_logs

SAVING = {"save_strategy": "steps", "save_steps": 6, "max_steps": 12}


def weights(trainer):
    return [param.detach() for param in trainer.model.parameters()]


def assert_equal_weights(left, right):
    assert all(torch.equal(a, b) for a, b in zip(weights(left), weights(right), strict=True))


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor"])
def test_it_is_stabilize_around_the_trainers_optimizer(tmp_path, optim):
    trainer = tiny_trainer(tmp_path, callbacks=[StabilizeCallback()], optim=optim)
    trainer.train()
    by_hand = tiny_trainer(tmp_path, optim=optim)
    stabilize(by_hand.create_optimizer())
    by_hand.train()
    plain = tiny_trainer(tmp_path, optim=optim)
    plain.train()
    assert_equal_weights(trainer, by_hand)
    assert not torch.equal(weights(trainer)[0], weights(plain)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "spam"])
def test_resuming_is_exact(tmp_path, optim, dtype):
    def run(folder, resume=None):
        callbacks = [StabilizeCallback(clip_beta=0.9)]
        model = tiny_llama().to(dtype)
        trainer = tiny_trainer(tmp_path / folder, model=model, callbacks=callbacks, optim=optim, **SAVING)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    straight = run("straight")
    resumed = run("resumed", str(tmp_path / "straight" / "checkpoint-6"))
    assert_equal_weights(straight, resumed)
    assert str(optimizer_of(straight).state_dict()) == str(optimizer_of(resumed).state_dict())


def test_its_arguments_reach_the_optimizer(tmp_path):
    trainer = tiny_trainer(tmp_path, callbacks=[StabilizeCallback(None, None)], optim="adamw_torch")
    trainer.train()
    plain = tiny_trainer(tmp_path, optim="adamw_torch")
    plain.train()
    assert_equal_weights(trainer, plain)


def test_training_again_goes_on(tmp_path):
    trainer = tiny_trainer(tmp_path, callbacks=[StabilizeCallback()], optim="adamw_torch", max_steps=2)
    trainer.train()
    trainer.train()
    assert optimizer_of(trainer).state_dict()["state"][0]["stabilizer_step"] == 4


def test_other_callbacks_work_beside_it(tmp_path):
    callbacks = [StabilizeCallback(clip_beta=0.5), GradientNormCallback(), MomentumResetCallback(every=3)]
    trainer = tiny_trainer(tmp_path, callbacks=callbacks, optim="adamw_torch")
    trainer.train()
    logs = training_logs(trainer)
    assert all(row["gradients/stable_norm"] > 0 for row in logs)
    assert any(row["gradients/stable_norm"] != pytest.approx(row["gradients/norm"]) for row in logs)
    assert [row["momentum/resets"] for row in logs] == [0, 0, 1, 0, 0, 1]


def test_the_trainers_own_clipping_is_warned_of(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        tiny_trainer(
            tmp_path, callbacks=[StabilizeCallback()], optim="adamw_torch", max_grad_norm=1.0, max_steps=1
        ).train()
    assert "max_grad_norm=1.0 clips the whole gradient before" in caplog.text
