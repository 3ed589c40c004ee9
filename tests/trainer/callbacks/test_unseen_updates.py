"""Callbacks that would come too late, or see slices of tensors, are refused when the Trainer is made or trains."""

import pytest
import torch
from accelerate.utils.deepspeed import HfDeepSpeedConfig

from hf_stablespam import GradientNormCallback, MomentumResetCallback, SpikeRecorder, StabilizeCallback
from hf_stablespam.optim import LayerwiseStableSPAM
from tests.trainer.helpers import arguments, tiny_llama, tiny_trainer

LATE = {
    "GradientNormCallback": GradientNormCallback,
    "SpikeRecorder": SpikeRecorder,
    "MomentumResetCallback": lambda: MomentumResetCallback(every=2),
}
SLICED = {
    "GradientNormCallback": GradientNormCallback,
    "SpikeRecorder": SpikeRecorder,
    "StabilizeCallback": StabilizeCallback,
    "MomentumResetCallback with on_spike": lambda: MomentumResetCallback(on_spike=5),
}


@pytest.mark.parametrize("name", LATE)
@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"optim_args": "layerwise=true"}, "layerwise=true"),
        ({"optim": "galore_adamw_layerwise", "optim_target_modules": "all-linear"}, "optim=galore_adamw_layerwise"),
        ({"optim": "lomo"}, "optim=lomo"),
    ],
)
def test_updates_inside_the_backward_pass(tmp_path, name, options, found):
    """Norms were 0, resets and warm-ups came a step late."""
    with pytest.raises(
        ValueError, match=f"{name} must see the gradients before .* with {found} they are updated inside"
    ):
        tiny_trainer(tmp_path, callbacks=[LATE[name]()], **options)


@pytest.mark.parametrize("name", LATE)
def test_a_layerwise_optimizer_that_the_script_made(tmp_path, name):
    model = tiny_llama()
    optimizer = LayerwiseStableSPAM(model.parameters())
    trainer = tiny_trainer(tmp_path, model=model, optimizers=(optimizer, None), callbacks=[LATE[name]()])
    with pytest.raises(ValueError, match=f"{name} must see the gradients"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("name", LATE)
def test_deepspeed_steps_inside_the_backward_pass(tmp_path, name):
    args = arguments(tmp_path)
    args.hf_deepspeed_config = HfDeepSpeedConfig({"train_batch_size": 1, "zero_optimization": {"stage": 0}})
    with pytest.raises(ValueError, match=f"{name} must .* with DeepSpeed they .*; use FSDP2 or DDP, or remove"):
        LATE[name]().on_init_end(args, _State(), None)


@pytest.mark.parametrize("name", SLICED)
def test_slices_of_tensors(tmp_path, name):
    args = arguments(tmp_path, optim="adamw_torch")
    args.fsdp, args.fsdp_config, args.fsdp_plugin_args = True, {"version": 1}, None
    with pytest.raises(ValueError, match=f"{name} does not work with FSDP version 1, whose flat slices"):
        SLICED[name]().on_init_end(args, _State(), None)
    args = arguments(tmp_path, optim="adamw_torch")
    args.hf_deepspeed_config = HfDeepSpeedConfig({"train_batch_size": 1, "zero_optimization": {"stage": 2}})
    with pytest.raises(ValueError, match=f"{name} does not work with DeepSpeed ZeRO stage 2|must see the gradients"):
        SLICED[name]().on_init_end(args, _State(), None)


class _State:
    stateful_callbacks: dict = {}  # noqa: RUF012


def test_a_reset_that_never_comes_is_said(tmp_path, caplog):
    callback = MomentumResetCallback(every=4, at=[5, 9, 20])
    tiny_trainer(tmp_path, callbacks=[callback], max_steps=6).train()
    assert "is to reset at step 9, 20, and the run has 6 update steps: that reset never comes" in caplog.text


def test_figures_for_logs_that_there_are_none_of(tmp_path, caplog):
    tiny_trainer(tmp_path, callbacks=[GradientNormCallback()], logging_strategy="no")
    assert "GradientNormCallback adds figures to the training logs, and logging_strategy is 'no'" in caplog.text


def test_options_of_spikes_without_spikes():
    with pytest.raises(
        ValueError, match="spike_window and spike_pause must be left out without on_spike, got 20 and 100"
    ):
        MomentumResetCallback(every=5, spike_window=20)


def test_a_step_that_breaks_off_in_a_warm_up_leaves_the_schedules_rates(tmp_path):
    """The next run of the same optimizer would begin with a part of its rate."""
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    callback, calls = MomentumResetCallback(at=[2], warmup_steps=4), []

    def break_off(*_):
        calls.append(optimizer.param_groups[0]["lr"])
        if len(calls) == 2:
            raise MemoryError

    hook = optimizer.register_step_pre_hook(break_off)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    trainer = tiny_trainer(tmp_path, model=model, optimizers=(optimizer, scheduler), callbacks=[callback])
    with pytest.raises(MemoryError):
        trainer.train()
    hook.remove()
    assert calls == [1e-3, 0.25e-3]
    callback._put_rates_back()
    assert {group["lr"] for group in optimizer.param_groups} == {1e-3}
