"""MomentumResetCallback: when it resets, what it does to the learning rate, and whom it allows beside it."""

import math

import pytest
import torch
from transformers import TrainerCallback

from hf_stablespam import MomentumResetCallback, StableSPAM
from tests.trainer.helpers import optimizer_of, tiny_llama, tiny_trainer, training_logs


class Watch(TrainerCallback):
    """The moments' step count and the learning rate that each update step really used; runs last."""

    def __init__(self):
        self.counts, self.rates = [], []

    def on_train_begin(self, args, state, control, optimizer, **kwargs):
        optimizer = getattr(optimizer, "optimizer", optimizer)
        key = "moment_step" if isinstance(optimizer, StableSPAM) else "step"

        def after_step(optimizer, *_):
            self.counts.append(int(next(iter(optimizer.state.values()))[key]))
            self.rates.append(optimizer.param_groups[0]["lr"])

        optimizer.register_step_post_hook(after_step)


def run(tmp_path, callback, *, others=(), resume=None, **overrides):
    watch = Watch()
    trainer = tiny_trainer(tmp_path, callbacks=[callback, *others, watch], **{"max_steps": 12, **overrides})
    trainer.train(resume_from_checkpoint=resume)
    return trainer, watch


@pytest.mark.parametrize("optim", ["stable_spam", "adamw_torch", "adamw_torch_fused"])
def test_resets_every_so_many_steps_and_at_chosen_ones(tmp_path, optim):
    trainer, watch = run(tmp_path, MomentumResetCallback(every=5, at=[7]), optim=optim)
    assert watch.counts == [1, 2, 3, 4, 1, 2, 1, 2, 3, 1, 2, 3]
    assert [row["momentum/resets"] for row in training_logs(trainer)] == [0, 0, 0, 0, 1, 0, 1, 0, 0, 1, 0, 0]


def test_equals_the_optimizers_own_interval(tmp_path):
    own = tiny_trainer(tmp_path, optim_args="reset_interval=4", max_steps=10)
    own.train()
    trainer, _ = run(tmp_path, MomentumResetCallback(4), max_steps=10)
    for expected, got in zip(own.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(expected, got)


def test_switches_the_optimizers_own_interval_off(tmp_path):
    model, watch = tiny_llama(), Watch()
    optimizer = StableSPAM(model.parameters(), reset_interval=2)
    callbacks = [MomentumResetCallback(at=[5]), watch]
    tiny_trainer(tmp_path, model=model, callbacks=callbacks, optimizers=(optimizer, None)).train()
    assert watch.counts == [1, 2, 3, 4, 1, 2]
    assert {group["reset_interval"] for group in optimizer.param_groups} == {None}


def test_switches_an_interval_from_a_checkpoint_off(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 6}
    tiny_trainer(tmp_path, optim_args="reset_interval=2", max_steps=12, **saving).train()
    trainer, watch = run(tmp_path, MomentumResetCallback(at=[9]), resume=str(tmp_path / "checkpoint-6"))
    assert watch.counts == [2, 3, 1, 2, 3, 4]
    assert {group["reset_interval"] for group in optimizer_of(trainer).param_groups} == {None}


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "warmup_stable_decay", "reduce_lr_on_plateau"])
def test_warm_up_multiplies_the_schedule(tmp_path, schedule):
    overrides = {"lr_scheduler_type": schedule, "optim": "adamw_torch"}
    if schedule == "warmup_stable_decay":
        overrides |= {"lr_scheduler_kwargs": {"num_decay_steps": 4}, "warmup_steps": 2}
    if schedule == "reduce_lr_on_plateau":
        overrides |= {"eval_strategy": "steps", "eval_steps": 4, "metric_for_best_model": "loss"}
    never = MomentumResetCallback(at=[1000])
    _, plain = run(tmp_path, never, **overrides)
    trainer, warmed = run(tmp_path, MomentumResetCallback(every=5, warmup_steps=3), **overrides)
    factors = [1, 1, 1, 1, 1 / 3, 2 / 3, 1, 1, 1, 1 / 3, 2 / 3, 1]
    expected = [rate * factor for rate, factor in zip(plain.rates, factors, strict=True)]
    assert warmed.rates == pytest.approx(expected, rel=1e-12)
    assert [row["momentum/warmup"] for row in training_logs(trainer)] == pytest.approx(factors)
    if schedule == "cosine":
        assert [row["learning_rate"] for row in training_logs(trainer)] == pytest.approx(expected)


def test_warm_up_works_under_torchs_recursive_schedules(tmp_path):
    """`CosineAnnealingLR` computes the next rate from the present one."""
    rates = {}
    for name, callback in (
        ("plain", MomentumResetCallback(at=[99])),
        ("warmed", MomentumResetCallback(5, (), None, 2)),
    ):
        model = tiny_llama()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12)
        watch = Watch()
        tiny_trainer(
            tmp_path, model=model, callbacks=[callback, watch], optimizers=(optimizer, scheduler), max_steps=12
        ).train()
        rates[name] = watch.rates
    factors = [0.5 if step in (5, 10) else 1 for step in range(1, 13)]
    assert rates["warmed"] == pytest.approx([r * f for r, f in zip(rates["plain"], factors, strict=True)], rel=1e-12)


class Spike(TrainerCallback):
    """Multiply the loss's gradient at chosen steps, before anything else sees it."""

    def __init__(self, at, factor=1000.0):
        self.at, self.factor, self.step = at, factor, 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.step = state.global_step + 1

    def on_init_end(self, args, state, control, model, **kwargs):
        def scale(grad):
            return grad * self.factor if self.step in self.at else grad

        model.lm_head.weight.register_hook(scale)


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.1])
@pytest.mark.parametrize("optim", ["stable_spam", "adamw_torch"])
def test_a_spike_leaves_the_moments_after_its_own_step(tmp_path, optim, max_grad_norm):
    callback = MomentumResetCallback(on_spike=20, warmup_steps=2)
    trainer, watch = run(
        tmp_path, callback, others=[Spike([8])], optim=optim, max_grad_norm=max_grad_norm, lr_scheduler_type="constant"
    )
    # The watch sees the count before the callback's reset at the end of the same step.
    assert watch.counts == [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4]
    assert watch.rates == pytest.approx([1e-3] * 8 + [5e-4] + [1e-3] * 3)
    assert [row["momentum/resets"] for row in training_logs(trainer)] == [0] * 7 + [1] + [0] * 4


def test_spikes_reset_at_most_once_in_a_pause(tmp_path):
    callback = MomentumResetCallback(on_spike=20, spike_pause=3)
    _, watch = run(tmp_path, callback, others=[Spike([6, 7, 8, 9])])
    assert watch.counts == [1, 2, 3, 4, 5, 6, 1, 2, 3, 1, 2, 3]


def test_nonfinite_norms_are_no_spikes(tmp_path):
    callback = MomentumResetCallback(on_spike=2)
    run(tmp_path, callback, others=[Spike([8], math.inf)])
    assert callback.last_spike == 0
    assert len(callback.norms) == 11
    assert all(map(math.isfinite, callback.norms))


def test_the_running_median_has_a_window(tmp_path):
    callback = MomentumResetCallback(on_spike=1e9, spike_window=7)
    # transformers 4.57 logs the norm only where it clips: here it does, and changes nothing.
    trainer, _ = run(tmp_path, callback, max_grad_norm=1e9)
    assert callback.norms == pytest.approx([row["grad_norm"] for row in training_logs(trainer)][-7:])


@pytest.mark.parametrize(
    ("callback", "spikes"),
    [
        (lambda: MomentumResetCallback(every=5, warmup_steps=4), []),
        (lambda: MomentumResetCallback(at=[11], on_spike=20, warmup_steps=4, spike_pause=3), [9, 11, 13]),
    ],
)
@pytest.mark.parametrize("restore", [False, True])
def test_a_resumed_run_resets_at_the_same_steps(tmp_path, callback, spikes, restore):
    options = {
        "max_steps": 20,
        "save_strategy": "steps",
        "save_steps": 10,
        "lr_scheduler_type": "cosine",
        "restore_callback_states_from_checkpoint": restore,
    }
    straight, expected = run(tmp_path / "a", callback(), others=[Spike(spikes)], **options)
    checkpoint = str(tmp_path / "a" / "checkpoint-10")
    resumed, got = run(tmp_path / "b", callback(), others=[Spike(spikes)], resume=checkpoint, **options)
    assert 1 in expected.counts[10:]
    assert got.counts == expected.counts[10:]
    assert got.rates == expected.rates[10:]
    for a, b in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_training_again_begins_anew(tmp_path):
    callback = MomentumResetCallback(on_spike=20)
    run(tmp_path, callback, others=[Spike([8])])
    assert callback.last_spike == 8
    run(tmp_path, callback, max_steps=1)
    assert (callback.last_spike, len(callback.norms)) == (0, 1)


def test_a_warm_up_that_breaks_off_leaves_no_rate_behind(tmp_path):
    """An update fails in the middle of a warm-up, and the same Trainer trains again."""
    fails = [True]

    class BreaksOff(TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer, **kwargs):
            def fail(*_):
                if fails and state.global_step == 6:
                    fails.clear()
                    raise RuntimeError("out of memory")

            optimizer.optimizer.register_step_pre_hook(fail)

    watch = Watch()
    callback = MomentumResetCallback(at=[6], warmup_steps=4)
    options = {"max_steps": 12, "lr_scheduler_type": "constant"}
    trainer = tiny_trainer(tmp_path, callbacks=[callback, BreaksOff(), watch], **options)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * 0.5)  # the second step of the warm-up
    watch.rates.clear()
    trainer.train()
    rates = [1e-3 * factor for factor in [1] * 5 + [0.25, 0.5, 0.75] + [1] * 4]
    assert watch.rates[::2] == pytest.approx(rates)  # it watches twice now
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {1e-3}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"every": 2.5}, "every must be an integer of at least 1, got 2.5"),
        ({"every": True}, "every must be an integer of at least 1, got True"),
        ({"every": "500"}, "every must be an integer of at least 1, got '500'"),
        ({"on_spike": math.inf}, "on_spike must be a finite number above 1, got inf"),
        ({"on_spike": "10"}, "on_spike must be a finite number above 1, got '10'"),
        ({"every": 9, "warmup_steps": -1}, "warmup_steps must be an integer of at least 0, got -1; 0 switches"),
    ],
)
def test_wrong_arguments(wrong, message):
    """Beside those of `test_wrong_uses.py`."""
    with pytest.raises(ValueError, match=message):
        MomentumResetCallback(**wrong)


def test_an_interval_that_is_switched_off_is_no_second_owner(tmp_path):
    tiny_trainer(tmp_path, callbacks=[MomentumResetCallback(every=10)], optim_args="reset_interval=none")
