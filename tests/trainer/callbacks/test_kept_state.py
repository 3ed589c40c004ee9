"""A resumed run logs what an undisturbed one logs: the callbacks' knowledge of the steps before is in checkpoints."""

import json

import pytest
from transformers import TrainerCallback, TrainerState

from hf_stablespam import GradientNormCallback, MomentumResetCallback, SpikeRecorder
from hf_stablespam.monitor.spike_file import read_spikes
from tests.trainer.callbacks.gradient_helpers import Spike
from tests.trainer.helpers import tiny_trainer, training_logs

# The checkpoint lies between two logs.
OPTIONS = {"max_steps": 12, "logging_steps": 4, "save_strategy": "steps", "save_steps": 6}
CHECKPOINT = "checkpoint-6"


def run(folder, make_callbacks, resume=None, **overrides):
    trainer = tiny_trainer(folder, callbacks=make_callbacks(), **{**OPTIONS, **overrides})
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def figures(trainer):
    """Ours. The Trainer's own loss after a resume is the mean since then."""
    return [{name: value for name, value in row.items() if "/" in name} for row in training_logs(trainer)]


def gradient_norms(**options):
    return lambda: [GradientNormCallback(**options), Spike([7], 1e4)]


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize("optim", ["stable_spam", "adamw_torch"])
@pytest.mark.parametrize(
    "make_callbacks",
    [
        gradient_norms(),
        gradient_norms(by="tensor", updates=False),
        gradient_norms(spike_score=None),
        lambda: [GradientNormCallback(), GradientNormCallback(by="block"), Spike([7], 1e4)],
        lambda: [MomentumResetCallback(at=[6, 7], on_spike=5.0, warmup_steps=3), Spike([8], 1e4)],
    ],
    ids=["whole", "tensors", "no score", "two", "resets"],
)
def test_the_same_logs(tmp_path, make_callbacks, optim, restore):
    options = {"optim": optim, "restore_callback_states_from_checkpoint": restore}
    straight = run(tmp_path / "straight", make_callbacks, **options)
    resumed = run(tmp_path / "resumed", make_callbacks, str(tmp_path / "straight" / CHECKPOINT), **options)
    assert figures(resumed) == figures(straight)
    assert len(figures(straight)) == 3


def test_the_test_above_would_notice_a_score_that_begins_anew(tmp_path):
    """The spike comes one step after the checkpoint, and nothing is scored in the first five of a run."""
    logs = training_logs(run(tmp_path, gradient_norms()))
    assert [row["gradients/spikes"] for row in logs] == [0, 1, 0]


def test_scores_by_entry_begin_anew(tmp_path):
    make_callbacks = gradient_norms(spike_score="entry")
    straight = run(tmp_path / "straight", make_callbacks)
    resumed = run(tmp_path / "resumed", make_callbacks, str(tmp_path / "straight" / CHECKPOINT))
    before, after = figures(straight)[1], figures(resumed)[1]
    assert {name for name in before if before[name] != after[name]} <= {
        "gradients/spike_score",
        "gradients/spike_score_mean",
        "gradients/spike_score_max",
        "gradients/spikes",
    }


@pytest.mark.parametrize("make_callback", [GradientNormCallback, SpikeRecorder, lambda: MomentumResetCallback(every=2)])
def test_a_checkpoint_of_a_run_without_the_callback(tmp_path, make_callback):
    """The Trainer looks for the place of each callback in the state that it has loaded."""
    run(tmp_path, list)
    run(tmp_path / "resumed", lambda: [make_callback()], str(tmp_path / CHECKPOINT))
    saved = TrainerState.load_from_json(str(tmp_path / "resumed" / "checkpoint-12" / "trainer_state.json"))
    assert type(make_callback()).__name__ in saved.stateful_callbacks


def test_nothing_is_restored_where_the_checkpoint_has_nothing(tmp_path):
    """Neither what a callback knows of an earlier run, nor what another one of its class has just put there."""
    first, second = GradientNormCallback(), GradientNormCallback(by="block")
    first._restored = {"scores": {"mean": [1.0]}}
    state = TrainerState(global_step=6, stateful_callbacks={})
    assert first.restored(state) == {}
    assert second.restored(state) == {}
    assert state.stateful_callbacks == {"GradientNormCallback": [first.state(), second.state()]}


def test_two_callbacks_that_a_checkpoint_does_not_have_are_both_in_the_next(tmp_path):
    def make_callbacks():
        return [GradientNormCallback(), GradientNormCallback(by="block", updates=False), Spike([10], 1e4)]

    more = {"save_steps": 3}
    run(tmp_path / "plain", list, **more)
    once = run(tmp_path / "once", make_callbacks, str(tmp_path / "plain" / "checkpoint-3"), **more)
    twice = run(tmp_path / "twice", make_callbacks, str(tmp_path / "once" / "checkpoint-9"), **more)
    assert figures(twice)[-1] == figures(once)[-1]


def test_resets_that_the_checkpoint_s_run_has_not_made_are_mentioned(tmp_path, caplog):
    plain, resetting = tmp_path / "plain", tmp_path / "resetting"
    run(plain, list)
    run(resetting, lambda: [MomentumResetCallback(at=[2, 6, 7])], str(plain / CHECKPOINT))
    assert "is to reset at step 2, 6, and the run goes on after step 6 of one that had no such" in caplog.text
    caplog.clear()
    run(tmp_path / "again", lambda: [MomentumResetCallback(at=[2, 6, 7])], str(resetting / "checkpoint-12"))
    assert "had no such callback" not in caplog.text


def test_a_checkpoint_with_other_figures(tmp_path):
    """AdamW has fewer than Stable-SPAM, and `updates=False` fewer still: what was counted is dropped, no more."""
    run(tmp_path, gradient_norms(), optim="adamw_torch")
    resumed = run(tmp_path / "resumed", gradient_norms(updates=False), str(tmp_path / CHECKPOINT))
    logs = training_logs(resumed)
    assert "gradients/update_norm" in logs[0]
    assert "gradients/update_norm" not in logs[1]
    assert logs[1]["gradients/clip_threshold"] > 0


def test_the_file_is_json_even_where_nothing_was_finite(tmp_path):
    run(tmp_path, lambda: [GradientNormCallback(), Spike([5, 6])], optim="adamw_torch")

    def refuse(constant):
        raise AssertionError(constant)

    text = (tmp_path / CHECKPOINT / "trainer_state.json").read_text()
    state = json.loads(text, parse_constant=refuse)["stateful_callbacks"]["GradientNormCallback"]
    assert state["attributes"]["window"]["kept"]["max"][0] is None


def spikes(folder):
    return [(row["step"], row["tensor"], row["score"]) for row in read_spikes(folder)]


def test_spikes_are_scored_as_in_an_undisturbed_run(tmp_path):
    def make_callbacks():
        return [SpikeRecorder(), Spike([6, 7], 1e6)]

    run(tmp_path / "straight", make_callbacks)
    run(tmp_path / "resumed", list)
    run(tmp_path / "resumed", make_callbacks, str(tmp_path / "straight" / CHECKPOINT))
    assert [step for step, *_ in spikes(tmp_path / "straight")] == [6, 7]
    assert spikes(tmp_path / "resumed") == spikes(tmp_path / "straight")[1:]


class Crash(TrainerCallback):
    """An error while a checkpoint is written, or right after it."""

    def on_save(self, args, state, control, **kwargs):
        raise RuntimeError("power cut")


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_no_spike_before_a_checkpoint_is_lost_in_a_crash(tmp_path, strategy):
    """The callback that crashes comes before the recorder, whose own `on_save` is never reached."""
    options = {"logging_steps": 100, "save_strategy": strategy, "max_steps": 20}
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path, lambda: [Crash(), SpikeRecorder(), Spike([6], 1e6)], **options)
    assert [step for step, *_ in spikes(tmp_path)] == [6]
