"""GradientNormCallback: right figures, in every log that the Trainer keeps."""

import json
import math

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback

from hf_stablespam import GradientNormCallback
from tests.trainer.helpers import optimizer_of, tiny_trainer, training_logs


class KeepNorms(TrainerCallback):
    """The norm of the gradient that reaches the optimizer, taken the slow way."""

    def __init__(self):
        self.norms = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        self.norms.append(torch.cat(grads).norm().item())


@pytest.mark.parametrize("optim", ["stable_spam", "adamw_torch", "sgd"])
def test_norm_is_that_of_the_whole_gradient(tmp_path, optim):
    keep = KeepNorms()
    trainer = tiny_trainer(tmp_path, callbacks=[GradientNormCallback(), keep], optim=optim)
    trainer.train()
    assert [row["gradients/norm"] for row in training_logs(trainer)] == pytest.approx(keep.norms, rel=1e-5)


@pytest.mark.parametrize("optim", ["stable_spam", "adamw_torch"])
def test_norm_is_the_one_before_the_trainers_clipping(tmp_path, optim):
    keep = KeepNorms()
    trainer = tiny_trainer(tmp_path, callbacks=[GradientNormCallback(), keep], optim=optim, max_grad_norm=0.1)
    trainer.train()
    assert max(keep.norms) == pytest.approx(0.1, rel=1e-4)
    for row in training_logs(trainer):
        assert row["gradients/norm"] == pytest.approx(row["grad_norm"])
        assert row["gradients/norm"] > 0.2


@pytest.mark.parametrize("accumulate", [1, 2])
def test_mean_and_maximum_cover_the_steps_between_two_logs(tmp_path, accumulate):
    keep = KeepNorms()
    trainer = tiny_trainer(
        tmp_path,
        callbacks=[GradientNormCallback(), keep],
        logging_steps=3,
        gradient_accumulation_steps=accumulate,
    )
    trainer.train()
    for row, steps in zip(training_logs(trainer), (keep.norms[:3], keep.norms[3:]), strict=True):
        assert row["gradients/norm"] == pytest.approx(steps[-1], rel=1e-5)
        assert row["gradients/norm_mean"] == pytest.approx(sum(steps) / 3, rel=1e-5)
        assert row["gradients/norm_max"] == pytest.approx(max(steps), rel=1e-5)


class Spike(TrainerCallback):
    """Multiply one entry of one gradient at chosen steps."""

    def __init__(self, at, factor):
        self.at, self.factor = at, factor

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        if state.global_step + 1 in self.at:
            model.lm_head.weight.grad[3, 5] *= self.factor


def test_clipped_entries_and_resets_are_counted(tmp_path):
    trainer = tiny_trainer(
        tmp_path,
        callbacks=[GradientNormCallback(), Spike([9], 1e6)],
        max_steps=12,
        logging_steps=2,
        optim_args="reset_interval=4",
    )
    counts = []
    original = trainer.create_optimizer

    def create_optimizer(*args):
        optimizer = original(*args)
        optimizer.register_step_post_hook(lambda opt, *_: counts.append(opt.statistics["clipped"].sum().item()))
        return optimizer

    trainer.create_optimizer = create_optimizer
    trainer.train()
    rows = training_logs(trainer)
    assert [row["gradients/clipped"] for row in rows] == [sum(counts[i : i + 2]) for i in range(0, 12, 2)]
    assert rows[4]["gradients/clipped"] > 0
    assert [row["gradients/resets"] for row in rows] == [0, 1, 0, 1, 0, 1]
    assert rows[4]["gradients/norm_max"] > 1000 * rows[3]["gradients/norm_max"]
    assert rows[4]["gradients/stable_norm_max"] < 10 * rows[3]["gradients/stable_norm_max"]
    assert {row["gradients/nonfinite"] for row in rows} == {0}


def test_a_nonfinite_gradient_is_counted(tmp_path):
    trainer = tiny_trainer(tmp_path, callbacks=[GradientNormCallback(), Spike([3], math.inf)])
    trainer.train()
    assert [row["gradients/nonfinite"] for row in training_logs(trainer)] == [0, 0, 1, 0, 0, 0]
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_figures_reach_tensorboard_and_the_saved_state(tmp_path):
    trainer = tiny_trainer(
        tmp_path / "out",
        callbacks=[GradientNormCallback()],
        report_to=["tensorboard"],
        save_strategy="steps",
        save_steps=6,
        logging_steps=2,
    )
    trainer.train()
    rows = training_logs(trainer)
    saved = json.loads((tmp_path / "out" / "checkpoint-6" / "trainer_state.json").read_text())
    assert [row for row in saved["log_history"] if "loss" in row] == rows
    (event_file,) = (tmp_path / "out").rglob("events.out.tfevents*")
    events = EventAccumulator(str(event_file)).Reload()
    for name in ("norm", "norm_max", "norm_mean", "clipped"):
        read = [(event.step, event.value) for event in events.Scalars(f"train/gradients/{name}")]
        assert read == [(row["step"], pytest.approx(row[f"gradients/{name}"])) for row in rows]


def test_evaluation_logs_stay_as_they_are(tmp_path):
    trainer = tiny_trainer(
        tmp_path, callbacks=[GradientNormCallback()], logging_steps=6, eval_strategy="steps", eval_steps=2
    )
    trainer.train()
    evaluations = [row for row in trainer.state.log_history if "eval_loss" in row]
    assert len(evaluations) == 3
    assert not [key for row in evaluations for key in row if key.startswith("gradients/")]
    assert len([row for row in trainer.state.log_history if "gradients/norm_max" in row]) == 1


def test_training_is_not_changed(tmp_path):
    weights = []
    for callbacks in ([], [GradientNormCallback()]):
        trainer = tiny_trainer(tmp_path, callbacks=callbacks)
        trainer.train()
        weights.append(list(trainer.model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert optimizer_of(trainer).statistics["grad_norm"].shape == (len(weights[0]),)
