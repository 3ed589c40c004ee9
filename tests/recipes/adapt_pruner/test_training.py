"""Inside of the Trainer: cuts between steps, stages, resets and their owner, resuming."""

import gc
import json
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback
from transformers.trainer_utils import FSDPOption

from hf_stablespam import (
    FourBitCallback,
    FourBitConfig,
    GradientNormCallback,
    MomentumResetCallback,
    SpikeRecorder,
    StabilizeCallback,
    convert_to_4bit,
)
from hf_stablespam.monitor.spike_file import read_spikes
from hf_stablespam.recipes.adapt_pruner import AdaptPruneCallback, adapt_prune, load_pruned, prune_and_train
from hf_stablespam.recipes.adapt_pruner.training.callback import refuse_arguments
from tests.processes import run_processes
from tests.recipes.adapt_pruner.models import batches, small
from tests.trainer.helpers import optimizer_of, tiny_trainer, training_logs

OPTIONS = {"optim": "stable_spam", "max_steps": 8, "learning_rate": 1e-2}


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


class Widths(TrainerCallback):
    """Parameters of the model in each step."""

    def __init__(self):
        self.seen = []

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.seen.append(parameters(model))


@pytest.mark.parametrize("choice", ["reset", "keep"])
def test_cuts_between_steps(choice, tmp_path):
    widths, prune = Widths(), AdaptPruneCallback(0.8, at_steps=[0, 3], optimizer_state=choice, steps=20)
    trainer = tiny_trainer(tmp_path, model=small(), callbacks=[widths, prune], **OPTIONS)
    trainer.train()
    whole = 28032
    first, second = (report.parameters_after for report in prune.reports)
    assert widths.seen == [first] * 3 + [second] * 5
    assert whole - (whole - int(0.8 * whole)) // 2 - 98 < first <= whole - (whole - int(0.8 * whole)) // 2
    assert int(0.8 * whole) - 98 < second <= int(0.8 * whole)
    own = [parameter for group in optimizer_of(trainer).param_groups for parameter in group["params"]]
    assert {id(parameter) for parameter in own} == {id(parameter) for parameter in trainer.model.parameters()}
    logs = [row.get("pruning/parameters") for row in training_logs(trainer)]
    assert logs == [first, None, second, None, None, None, None, None]
    shares = training_logs(trainer)[2]
    assert 0 <= shares["pruning/sparsity_min"] < shares["pruning/sparsity_mean"] < shares["pruning/sparsity_max"]


def test_stages_share_the_run_as_they_share_the_data(tmp_path):
    widths = Widths()
    callbacks = [widths, AdaptPruneCallback(0.7, stages=3, calibration=batches(), steps=20)]
    tiny_trainer(tmp_path, model=small(), callbacks=callbacks, **{**OPTIONS, "max_steps": 12}).train()
    lengths = [widths.seen.count(value) for value in sorted(set(widths.seen), reverse=True)]
    assert lengths == [2, 4, 6]


def whole_and_resumed(trainer, checkpoint):
    """A run in the checkpoint's folder, and one that goes on from the checkpoint, from `trainer(model, folder)`."""
    whole = trainer(small(), checkpoint.parent)
    whole.train()
    resumed = trainer(load_pruned(checkpoint, dtype=torch.float32), checkpoint.parent.parent / "resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    return whole, resumed


def test_ten_steps_and_ten_more_equal_twenty(tmp_path):
    """A cut at step 10, where the checkpoint is, with a warm-up after its reset: both survive."""

    def trainer(model, folder):
        callbacks = [
            MomentumResetCallback(every=100, warmup_steps=4),
            AdaptPruneCallback(0.8, at_steps=[4, 10], steps=20),
        ]
        more = {"save_strategy": "steps", "save_steps": 10, "lr_scheduler_type": "cosine", "max_steps": 20}
        return tiny_trainer(folder, model=model, callbacks=callbacks, **{**OPTIONS, **more})

    checkpoint = tmp_path / "whole" / "checkpoint-10"
    whole, resumed = whole_and_resumed(trainer, checkpoint)
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert [row["loss"] for row in training_logs(whole)] == [row["loss"] for row in training_logs(resumed)]
    dense = trainer(small(), tmp_path / "dense")
    with pytest.raises(RuntimeError, match="size mismatch"):
        dense.train(resume_from_checkpoint=str(checkpoint))


class Truth(TrainerCallback):
    """Figures of each step from the model itself, in float64."""

    def __init__(self):
        self.rows, self.before = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.before = [parameter.detach().double().clone() for parameter in model.parameters()]

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        after = [parameter.detach().double() for parameter in model.parameters()]
        updates = [old - new for old, new in zip(self.before, after, strict=True)]
        layer = model.model.layers[1].parameters()
        of_row = {
            "norm": [parameter.grad for parameter in model.parameters()],
            "norm/model.layers.1": [parameter.grad for parameter in layer],
            "weight_norm": after,
            "update_norm": updates,
        }
        row = {name: torch.cat([part.flatten().double() for part in parts]).norm() for name, parts in of_row.items()}
        self.rows.append({f"gradients/{name}": value.item() for name, value in row.items()})


@pytest.mark.parametrize("score", ["tensor", "entry"])
@pytest.mark.parametrize("optim", ["adamw_torch", "stable_spam"])
def test_the_figures_of_the_step_after_a_cut_are_the_model_s(tmp_path, optim, score):
    truth, prune = Truth(), AdaptPruneCallback(0.7, at_steps=[3], steps=5)
    watching = [GradientNormCallback(by="block", spike_score=score), prune, truth]
    trainer = tiny_trainer(tmp_path, model=small(), callbacks=watching, **{**OPTIONS, "optim": optim})
    trainer.train()
    logs = training_logs(trainer)
    assert len(logs) == len(truth.rows) == 8
    for logged, true in zip(logs, truth.rows, strict=True):
        assert {name: logged[name] for name in true} == pytest.approx(true, rel=1e-5)
    if optim == "stable_spam":
        clipped = [row["gradients/clipped"] for row in logs[3:]]
        shares = [row["gradients/clipped_share"] * parameters(trainer.model) for row in logs[3:]]
        assert shares == pytest.approx(clipped)
        assert any(clipped)


def test_figures_over_a_cut_survive_a_checkpoint(tmp_path):
    """The cut and the checkpoint lie between two logs: shares are of the entries that each step had."""

    def trainer(model, folder):
        callbacks = [GradientNormCallback(by="block"), AdaptPruneCallback(0.8, at_steps=[4], steps=5)]
        more = {"save_strategy": "steps", "save_steps": 4, "logging_steps": 3}
        return tiny_trainer(folder, model=model, callbacks=callbacks, **{**OPTIONS, **more})

    checkpoint = tmp_path / "whole" / "checkpoint-4"
    whole, resumed = whole_and_resumed(trainer, checkpoint)
    one, other = (
        [{name: value for name, value in row.items() if "/" in name} for row in training_logs(run)]
        for run in (whole, resumed)
    )
    assert one == other
    assert len(one) == 2
    entries = 28032 + 2 * parameters(whole.model)
    assert one[1]["gradients/clipped_share"] == pytest.approx(one[1]["gradients/clipped"] / entries) != 0


class SpikeInACutTensor(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == 8:
            model.model.layers[1].mlp.down_proj.weight.grad[0, 0] = 1e4


@pytest.mark.parametrize("optim", ["adamw_torch", "stable_spam"])
def test_a_spike_in_a_cut_tensor_is_recorded(tmp_path, optim):
    callbacks = [SpikeRecorder(), AdaptPruneCallback(0.7, at_steps=[6], steps=5), SpikeInACutTensor()]
    options = {**OPTIONS, "optim": optim, "logging_steps": 4}
    tiny_trainer(tmp_path, model=small(), callbacks=callbacks, **options).train()
    rows = [(row["step"], row["tensor"], row["magnitude"]) for row in read_spikes(tmp_path)]
    assert (8, "model.layers.1.mlp.down_proj.weight", 1e4) in rows


@pytest.mark.parametrize("choice", ["reset", "keep"])
def test_nothing_holds_the_parameters_that_were_cut(tmp_path, choice):
    """Neither the figures, nor the trackers of `stabilize`, nor what remembers how to reset."""
    model = small()
    old = weakref.ref(model.model.layers[1].mlp.down_proj.weight)
    prune = AdaptPruneCallback(0.7, at_steps=[3], steps=5, optimizer_state=choice)
    watching = [StabilizeCallback(), GradientNormCallback(), SpikeRecorder(), MomentumResetCallback(every=100), prune]
    trainer = tiny_trainer(tmp_path, model=model, callbacks=watching, **{**OPTIONS, "optim": "adamw_torch"})
    trainer.train()
    gc.collect()
    assert old() is None


def resumed_with(folder, callback, of_run=(), **options):
    """A run of 2 steps, and a Trainer that goes on from its end with the callback; with none, a run without it."""
    options = {**OPTIONS, "save_strategy": "steps", "save_steps": 2, **options}
    first = tiny_trainer(folder / "first", model=small(), callbacks=of_run, **{**options, "max_steps": 2})
    first.train()
    trainer = tiny_trainer(folder / "second", model=first.model, callbacks=[callback], **options)
    return trainer, str(folder / "first" / "checkpoint-2")


@pytest.mark.parametrize("at_steps", [[3, 5], [2, 4]])
def test_a_callback_that_the_checkpoint_does_not_have_cuts_as_in_a_new_run(tmp_path, at_steps):
    widths, prune = Widths(), AdaptPruneCallback(0.8, at_steps=at_steps, steps=20)
    trainer, checkpoint = resumed_with(tmp_path, prune)
    trainer.add_callback(widths)
    trainer.train(resume_from_checkpoint=checkpoint)
    whole, target = 28032, int(0.8 * 28032)
    assert [report.target_parameters for report in prune.reports] == [whole - (whole - target) // 2, target]
    first, second = (report.parameters_after for report in prune.reports)
    before = [whole] * (at_steps[0] - 2)
    assert widths.seen == before + [first] * 2 + [second] * (8 - at_steps[1])


@pytest.mark.parametrize(
    ("made", "options", "match"),
    [
        ([], {"at_steps": [0, 4]}, r"at_steps must cut from step 2 on, .* got a cut at step 0, which .* \[0, 4\]\)"),
        ([], {"stages": 2}, r"stages=2 must cut from step 2 on, where this run begins, got a cut at step 0"),
        ([0], {"at_steps": [0, 1]}, r"at_steps must cut from step 2 on, where this run begins, got a cut at step 1"),
        ([0, 1], {"at_steps": [6]}, r"at_steps must begin with the 2 cuts .* up to step 2, got \[6\]; write their"),
        ([0, 1], {"stages": 1}, r"stages=1 must begin with the 2 cuts .* up to step 2, got \[0\]; write their"),
    ],
)
def test_cuts_that_do_not_fit_the_checkpoint(tmp_path, made, options, match):
    of_run = [AdaptPruneCallback(0.9, at_steps=made, steps=5, calibration=batches())] if made else []
    later = AdaptPruneCallback(0.8, steps=5, **options)
    trainer, checkpoint = resumed_with(tmp_path, later, of_run, max_steps=7)
    with pytest.raises(ValueError, match=match):
        trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.state.global_step == 2
    assert not later.reports


def test_a_reset_has_one_owner(tmp_path):
    """The callback of the resets counts those of the stages, and warms up after them."""
    callbacks = [
        MomentumResetCallback(every=100, warmup_steps=4),
        AdaptPruneCallback(0.9, at_steps=[3], steps=20),
    ]
    options = {**OPTIONS, "lr_scheduler_type": "constant"}
    trainer = tiny_trainer(tmp_path, model=small(), callbacks=callbacks, **options)
    trainer.train()
    rates = [row["learning_rate"] for row in training_logs(trainer)]
    assert rates == pytest.approx([1e-2] * 3 + [0.25e-2, 0.5e-2, 0.75e-2, 1e-2, 1e-2])
    assert [row["momentum/resets"] for row in training_logs(trainer)] == [0, 0, 0, 1, 0, 0, 0, 0]


def test_beside_the_other_callbacks_and_in_4_bits(tmp_path):
    """Measured through the 4-bit layers, cut to whole groups, accumulated, watched."""
    config = FourBitConfig(group_size=16, activation="int4")
    callbacks = [FourBitCallback(config), GradientNormCallback(by="block"), SpikeRecorder()]
    callbacks.append(AdaptPruneCallback(0.8, at_steps=[0, 4], steps=20, amplitude=0.01))
    options = {**OPTIONS, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    trainer = tiny_trainer(tmp_path, model=small(), callbacks=callbacks, **options)
    trainer.train()
    for layer in trainer.model.model.layers:
        assert layer.mlp.down_proj.in_features % 16 == 0
        assert layer.self_attn.o_proj.in_features % 16 == 0
        quantized = layer.mlp.down_proj.quantized_weight()
        assert quantized.shape == layer.mlp.down_proj.weight.shape
    assert parameters(trainer.model) <= int(0.8 * 28032)
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in training_logs(trainer))


def test_the_scores_are_those_of_the_4_bit_forward():
    plain = adapt_prune(small(), 0.8, batches(), show_progress=False)
    converted = convert_to_4bit(small(), FourBitConfig(group_size=32))
    with torch.no_grad():
        losses = [converted(**batch, labels=batch["input_ids"]).loss.item() for batch in batches()]
    coarse = adapt_prune(converted, 0.8, batches(), show_progress=False, multiple_of=1)
    assert coarse.reached
    assert coarse.steps[0].loss == pytest.approx(sum(losses) / 2)
    assert coarse.steps[0].loss != pytest.approx(plain.steps[0].loss)


def test_prune_and_train(tmp_path):
    """Parts of data and steps, targets, one schedule, new optimizers; the arguments of the caller stay as they were."""
    stages, rates, sizes = [], [], []

    class Rates(TrainerCallback):
        def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            rates.append(optimizer.param_groups[0]["lr"])

    made = []

    def make_trainer(model, stage):
        more = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"min_lr_ratio": 0.1}}
        trainer = tiny_trainer(
            tmp_path / str(stage),
            model=model,
            callbacks=[Rates()],
            **{**OPTIONS, **more, "max_steps": -1, "num_train_epochs": 2, "warmup_steps": 3},
        )
        made.append(trainer.args)
        return trainer

    def at_end(trainer, stage, report):
        stages.append((stage, parameters(trainer.model), report.target_parameters, trainer.state.global_step))
        sizes.append(len(trainer.train_dataset))
        assert training_logs(trainer)[0]["pruning/parameters"] == report.parameters_after

    model = small()
    result = prune_and_train(model, make_trainer, 0.7, stages=3, calibration=batches(), steps=20, on_stage_end=at_end)
    assert result is model
    assert sizes == [10, 21, 33]
    assert [stage[3] for stage in stages] == [6, 12, 18]
    whole, target = 28032, int(0.7 * 28032)
    assert [stage[2] for stage in stages] == [whole - (whole - target) * k // 3 for k in (1, 2, 3)]
    assert all(after <= wanted for _, after, wanted, _ in stages)
    assert [args.max_steps for args in made] == [-1, -1, -1]
    expected = [1e-2 * (0.1 + 0.9 * i / 3) for i in range(3)] + [1e-2] * 29
    expected += [1e-2 * (0.1 + 0.9 * (1 - i / 4)) for i in range(4)]
    assert rates == pytest.approx(expected)


def test_going_on_with_a_later_stage(tmp_path):
    """From the checkpoint of a stage, with the targets of the whole run, to the same model."""

    def make_trainer(model, stage):
        more = {"save_strategy": "no", "max_steps": 6}
        return tiny_trainer(tmp_path / str(stage), model=model, **{**OPTIONS, **more})

    def save(trainer, stage, report):
        if stage == 0:
            trainer.save_model(tmp_path / "first")
            (tmp_path / "first" / "pruning.json").write_text(json.dumps({"layers": report.widths, "config": {}}))

    options = {"stages": 2, "calibration": None, "steps": 10}
    whole = prune_and_train(small(), make_trainer, 0.8, on_stage_end=save, **options)
    model = load_pruned(tmp_path / "first", dtype=torch.float32)
    prune_and_train(model, make_trainer, 0.8, first_stage=1, original_parameters=28032, **options)
    for one, other in zip(whole.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_checkpoints_say_the_widths(tmp_path):
    callbacks = [AdaptPruneCallback(0.8, at_steps=[2], calibration=batches(), steps=20)]
    more = {"save_strategy": "steps", "save_steps": 2}
    trainer = tiny_trainer(tmp_path, model=small(), callbacks=callbacks, **{**OPTIONS, **more})
    trainer.train()
    assert all((Path(tmp_path) / f"checkpoint-{step}" / "pruning.json").is_file() for step in (2, 4, 8))
    loaded = load_pruned(tmp_path / "checkpoint-8", dtype=torch.float32)
    for one, other in zip(trainer.model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(one, other)


def test_more_than_one_process_is_refused(tmp_path, monkeypatch):
    for name, value, match in (
        ("world_size", 2, "world size must be 1 with AdaptPruneCallback, got 2: DDP does not synchronise"),
        ("fsdp", [FSDPOption.FULL_SHARD], "fsdp=.* shards the weights"),
        ("deepspeed", {"zero_optimization": {"stage": 1}}, "deepspeed partitions what the callback cuts"),
    ):
        args = SimpleNamespace(**{"world_size": 1, "fsdp": [], "deepspeed": None, "fp16": False, name: value})
        with pytest.raises(ValueError, match=match):
            refuse_arguments(args)
    for name, match in (("is_fsdp_enabled", "FSDP shards the weights"), ("is_deepspeed_enabled", "DeepSpeed shards")):

        def make_trainer(model, stage, name=name):
            trainer = tiny_trainer(tmp_path, model=model)
            setattr(trainer, name, True)
            return trainer

        with pytest.raises(ValueError, match=match):
            prune_and_train(small(), make_trainer, 0.8, stages=1, calibration=batches())


def on_two_processes(folder):
    """A wrapped model is refused; stages leave both processes with the same weights."""
    model = small()
    with pytest.raises(ValueError, match="wrapped in DistributedDataParallel"):
        adapt_prune(torch.nn.parallel.DistributedDataParallel(model), 0.8, batches())

    def make_trainer(model, stage):
        trainer = tiny_trainer(folder / str(stage), model=model, **{**OPTIONS, "max_steps": 6})
        with pytest.raises(ValueError, match="world size must be 1"):
            trainer.add_callback(AdaptPruneCallback(0.5, stages=2)) or trainer.callback_handler.on_init_end(
                trainer.args, trainer.state, trainer.control
            )
        trainer.remove_callback(AdaptPruneCallback)
        return trainer

    rank = torch.distributed.get_rank()
    own = batches(seed=rank)  # other batches on each process: their scores differ, the cut must not
    prune_and_train(model, make_trainer, 0.8, stages=2, calibration=own, steps=10)
    torch.save(model.state_dict(), folder / f"{rank}.pt")


@pytest.mark.slow
def test_stages_on_two_processes(tmp_path):
    run_processes(2, on_two_processes, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
    assert sum(value.numel() for value in first.values()) <= int(0.8 * 28032)
