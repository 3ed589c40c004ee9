"""`decay_steps="auto"` is the length of the run, however the run comes about."""

import logging

import pytest
import torch
from transformers import Trainer

from tests.trainer.helpers import optimizer_of, tiny_trainer


def decay_steps(trainer) -> set:
    return {group["decay_steps"] for group in trainer.optimizer.param_groups}


def ours(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("hf_stablespam")]


class OwnSchedule(Trainer):
    def create_scheduler(self, num_training_steps, optimizer=None):
        self.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(self.optimizer, factor=1.0)
        return self.lr_scheduler


@pytest.mark.parametrize("trainer_cls", [Trainer, OwnSchedule])
@pytest.mark.parametrize("length", [{"max_steps": 5}, {"max_steps": -1, "num_train_epochs": 0.5}])
def test_the_decay_spans_the_run(tmp_path, length, trainer_cls):
    trainer = tiny_trainer(tmp_path, trainer_cls=trainer_cls, **length)
    assert {group["decay_steps"] for group in trainer.create_optimizer().param_groups} == {"auto"}
    trainer.train()
    assert decay_steps(trainer) == {trainer.state.max_steps}


@pytest.mark.parametrize(("text", "expected"), [("decay_steps=none", None), ("total_T=77", 77)])
def test_an_explicit_decay_stays(tmp_path, text, expected):
    trainer = tiny_trainer(tmp_path, optim_args=text, max_steps=1)
    trainer.train()
    assert decay_steps(trainer) == {expected}
    trainer.train()
    assert decay_steps(trainer) == {expected}


def test_a_resumed_run_keeps_the_decay_that_it_began_with_and_says_so(tmp_path, caplog):
    tiny_trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=2).train()
    trainer = tiny_trainer(tmp_path, max_steps=6)
    with caplog.at_level(logging.WARNING, logger="hf_stablespam"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 6
    assert decay_steps(trainer) == {4}
    (text,) = ours(caplog)
    assert "spans 4 update steps" in text
    assert "now 6 long" in text


def test_a_run_that_is_resumed_as_long_as_it_was_says_nothing(tmp_path, caplog):
    tiny_trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=2).train()
    with caplog.at_level(logging.WARNING, logger="hf_stablespam"):
        tiny_trainer(tmp_path, max_steps=4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert not ours(caplog)


def test_a_second_train_goes_on_with_the_count(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=4)
    trainer.train()
    trainer.args.max_steps = 20
    trainer.train()
    (step,) = {float(state["step"]) for state in optimizer_of(trainer).state.values()}
    assert step == 24
    assert decay_steps(trainer) == {24}


def test_a_smaller_batch_after_running_out_of_memory_makes_a_longer_run(tmp_path):
    """In epochs: 64 rows are 8 steps of 8, and more with each try, which goes on with the optimizer."""

    class TooLarge(Trainer):
        def training_step(self, model, inputs, *args, **kwargs):
            if len(inputs["input_ids"]) > 5 and self.state.global_step == 1:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            return super().training_step(model, inputs, *args, **kwargs)

    options = {"auto_find_batch_size": True, "per_device_train_batch_size": 8, "max_steps": -1, "num_train_epochs": 1}
    trainer = tiny_trainer(tmp_path, trainer_cls=TooLarge, **options)
    trainer.train()
    (step,) = {float(state["step"]) for state in optimizer_of(trainer).state.values()}
    assert trainer.state.max_steps >= 13
    assert step > trainer.state.max_steps, "the steps before memory ran out count"
    assert decay_steps(trainer) == {step}


def test_a_loop_of_ones_own_with_the_trainers_optimizer_and_schedule(tmp_path):
    trainer = tiny_trainer(tmp_path)
    trainer.create_optimizer_and_scheduler(num_training_steps=7)
    assert decay_steps(trainer) == {7}


def test_a_loop_of_ones_own_with_the_optimizer_alone_is_told_what_to_give(tmp_path):
    """Nobody but its author knows how long it is: an error before the first update, not a decay of a wrong length."""
    trainer = tiny_trainer(tmp_path)
    optimizer = trainer.create_optimizer()
    before = [param.clone() for param in trainer.model.parameters()]
    trainer.model(**next(iter(trainer.get_train_dataloader()))).loss.backward()
    with pytest.raises(ValueError, match=r"decay_steps must be a number .* got 'auto'; .*optim_args='decay_steps=N'"):
        optimizer.step()
    assert all(map(torch.equal, before, trainer.model.parameters()))
    trainer = tiny_trainer(tmp_path, optim_args="decay_steps=9")
    optimizer = trainer.create_optimizer()
    trainer.model(**next(iter(trainer.get_train_dataloader()))).loss.backward()
    optimizer.step()
    assert {group["decay_steps"] for group in optimizer.param_groups} == {9}
