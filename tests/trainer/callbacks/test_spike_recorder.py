"""SpikeRecorder: what it writes about a spike, and when."""

import json
import re

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import set_seed

from hf_stablespam import FourBitCallback, FourBitConfig, GradientNormCallback, MomentumResetCallback, SpikeRecorder
from hf_stablespam.monitor.report.runs import read_runs
from hf_stablespam.monitor.spike_file import read_spikes
from tests.trainer.callbacks.gradient_helpers import Spike
from tests.trainer.helpers import RandomTokens, arguments, tiny_llama, tiny_trainer


class KeepBatches(Trainer):
    """A Trainer that notes each step's tokens and losses."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.tokens, self.losses = [], []

    def training_step(self, model, inputs, *args, **kwargs):
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.tokens.append(inputs["input_ids"].clone())
        self.losses.append(loss.item())
        return loss


def rows_of(tokens):
    """Indices of these sequences in the data set."""
    data = RandomTokens().tokens
    return [int((data == row).all(1).nonzero()[0, 0]) for row in tokens]


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("optim", ["stable_spam", "adamw_torch"])
def test_a_spike_is_written_with_all_that_is_known(tmp_path, optim, accumulate):
    """Batches of 4 from 64 rows: step 19 is not in the first epoch; with 3 of them an epoch ends with a single one."""
    trainer = tiny_trainer(
        tmp_path,
        trainer_cls=KeepBatches,
        callbacks=[SpikeRecorder(), Spike([19], 1e6)],
        optim=optim,
        gradient_accumulation_steps=accumulate,
        max_steps=20,
        logging_steps=8,
        dataloader_num_workers=2 if accumulate == 3 else 0,
    )
    grads = {}
    trainer.add_callback(KeepGradient(grads, 19))
    trainer.train()
    (spike,) = read_spikes(tmp_path)
    batches = [1] * 20 if accumulate == 1 else ([3] * 5 + [1]) * 4
    first = sum(batches[:18])
    used = slice(first, first + batches[18])
    assert spike["step"] == 19
    assert spike["tensor"] == "lm_head.weight"
    assert spike["magnitude"] == pytest.approx(grads["lm_head.weight"], rel=1e-5)
    assert 0 < spike["threshold"] < spike["magnitude"]
    assert spike["score"] > 100
    assert spike["loss"] == pytest.approx(sum(trainer.losses[used]), rel=1e-5)
    assert spike["learning_rate"] == pytest.approx(1e-3 * (1 - 18 / 20))
    assert spike["data_indices"] == rows_of(torch.cat(trainer.tokens[used]))


class KeepGradient(TrainerCallback):
    """Largest gradient entries of one step."""

    def __init__(self, largest, step):
        self.largest, self.step = largest, step

    def on_optimizer_step(self, args, state, control, model, **kwargs):
        if state.global_step + 1 == self.step:
            self.largest |= {name: p.grad.abs().max().item() for name, p in model.named_parameters()}


def test_the_threshold_is_adaclips(tmp_path):
    trainer = tiny_trainer(tmp_path, callbacks=[SpikeRecorder(), Spike([12], 1e4)], max_steps=12)
    trainer.train()
    (spike,) = read_spikes(tmp_path)
    names = [name for name, _ in trainer.model.named_parameters()]
    place = [id(p) for group in trainer.optimizer.optimizer.param_groups for p in group["params"]].index(
        id(dict(trainer.model.named_parameters())["lm_head.weight"])
    )
    assert spike["tensor"] in names
    assert spike["threshold"] == pytest.approx(trainer.optimizer.optimizer.statistics["clip_threshold"][place].item())


def test_magnitudes_are_those_before_the_trainers_clipping(tmp_path):
    magnitudes = []
    for max_grad_norm in (0.0, 0.01):
        folder = tmp_path / str(max_grad_norm)
        trainer = tiny_trainer(
            folder,
            callbacks=[SpikeRecorder()],
            optim="sgd",
            learning_rate=0.0,
            max_grad_norm=max_grad_norm,
            max_steps=12,
        )
        calls = [0]
        trainer.model.lm_head.weight.register_hook(lambda grad, calls=calls: spiked(grad, calls, at=12))
        trainer.train()
        (spike,) = read_spikes(folder)
        magnitudes.append(spike["magnitude"])
    assert magnitudes[0] == pytest.approx(magnitudes[1], rel=1e-4)


def spiked(grad, calls, at):
    """The gradient as the backward pass makes it, with one huge entry at its `at`-th call."""
    calls[0] += 1
    return grad * (1 + 1e4 * (torch.arange(grad.numel()).view_as(grad) == 7)) if calls[0] == at else grad


def test_a_nonfinite_gradient_is_a_spike(tmp_path):
    trainer = tiny_trainer(tmp_path, callbacks=[SpikeRecorder(), Spike([3])])
    trainer.train()
    (spike,) = read_spikes(tmp_path)
    assert (spike["step"], spike["tensor"]) == (3, "lm_head.weight")
    assert spike["magnitude"] is None
    assert spike["score"] is None
    assert spike["loss"] > 0


def test_no_file_without_spikes(tmp_path):
    trainer = tiny_trainer(tmp_path, callbacks=[SpikeRecorder()], max_steps=12)
    trainer.train()
    assert not (tmp_path / "spikes.jsonl").exists()


def test_the_last_ones_are_kept(tmp_path):
    trainer = tiny_trainer(
        tmp_path, callbacks=[SpikeRecorder(keep=3), Spike([3, 5, 7, 8, 10])], max_steps=10, logging_steps=2
    )
    trainer.train()
    assert [spike["step"] for spike in read_spikes(tmp_path)] == [7, 8, 10]


def test_spikes_are_there_when_a_checkpoint_is(tmp_path):
    found = []

    class Look(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            found.append([spike["step"] for spike in read_spikes(tmp_path)])

    callbacks = [SpikeRecorder(), Spike([2, 5]), Look()]
    trainer = tiny_trainer(tmp_path, callbacks=callbacks, logging_steps=50, save_strategy="steps", save_steps=3)
    trainer.train()
    assert found == [[2], [2, 5]]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_resumed_run_goes_on_with_the_file(tmp_path, accumulate):
    """Same spikes on the same data as in one run: the skipped batches of the resumed epoch are counted."""

    def trainer(**more):
        return tiny_trainer(
            tmp_path,
            callbacks=[SpikeRecorder(), Spike([2, 8, 10])],
            max_steps=12,
            gradient_accumulation_steps=accumulate,
            save_strategy="steps",
            save_steps=9 if accumulate == 3 else 6,
            **more,
        )

    trainer().train()
    whole = read_spikes(tmp_path)
    assert [spike["step"] for spike in whole] == [2, 8, 10]
    trainer().train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{9 if accumulate == 3 else 6}"))
    assert read_spikes(tmp_path) == whole


def test_another_run_in_the_folder_begins_the_file_anew(tmp_path):
    for step in (3, 4):
        tiny_trainer(tmp_path, callbacks=[SpikeRecorder(), Spike([step])]).train()
        assert [spike["step"] for spike in read_spikes(tmp_path)] == [step]


def test_the_learning_rate_is_the_one_trained_with(tmp_path):
    """A warm-up that another callback makes, whichever of the two comes first."""
    for index in (0, 1):
        callbacks = [SpikeRecorder(), MomentumResetCallback(at=[3], warmup_steps=4)][:: 1 if index else -1]
        folder = tmp_path / str(index)
        tiny_trainer(folder, callbacks=[*callbacks, Spike([4])], lr_scheduler_type="constant").train()
        (spike,) = read_spikes(folder)
        assert spike["learning_rate"] == pytest.approx(1e-3 * 2 / 4)


class Stream(IterableDataset):
    def __iter__(self):
        data = RandomTokens()
        for index in range(len(data)):
            yield data[index]


def test_a_stream_has_no_indices(tmp_path):
    trainer = Trainer(
        model=tiny_llama(),
        args=arguments(tmp_path),
        train_dataset=Stream(),
        callbacks=[SpikeRecorder(), Spike([3])],
    )
    trainer.train()
    (spike,) = read_spikes(tmp_path)
    assert spike["data_indices"] is None
    assert spike["loss"] > 0


def test_training_is_not_changed_and_nothing_stays_behind(tmp_path):
    weights = []
    for callbacks in ([], [SpikeRecorder()]):
        set_seed(0)
        trainer = tiny_trainer(tmp_path, callbacks=callbacks, max_steps=20)
        trainer.train()
        weights.append(list(trainer.model.parameters()))
        sampler = trainer.callback_handler.train_dataloader.batch_sampler
        assert type(sampler) is torch.utils.data.BatchSampler
        assert not [name for name in vars(sampler) if "stablespam" in name]
        assert not trainer.optimizer.optimizer._optimizer_step_pre_hooks
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_beside_the_other_callbacks(tmp_path):
    callbacks = [GradientNormCallback(), SpikeRecorder(), MomentumResetCallback(on_spike=5.0), Spike([8], 1e4)]
    tiny_trainer(tmp_path, callbacks=callbacks, max_steps=10).train()
    assert [spike["step"] for spike in read_spikes(tmp_path)] == [8]
    assert json.loads((tmp_path / "spikes.jsonl").read_text())["tensor"] == "lm_head.weight"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 2.5}, "keep must be an integer of at least 1, got 2.5; 1000 is usual"),
        ({"above": float("nan")}, "above must be a finite number above 1, got nan; 10 is usual"),
    ],
)
def test_bad_arguments(options, message):
    """Beside those of `test_wrong_uses.py`."""
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        SpikeRecorder(**options)


@pytest.mark.parametrize("names", [None, lambda trial: f"trial{trial.number}"])
def test_each_trial_of_a_hyperparameter_search_has_spikes_and_an_export_of_its_own(tmp_path, names):
    """In the folder that the Trainer gives it, where a report finds them; the output folder itself has none."""
    optuna = pytest.importorskip("optuna", reason="the search needs optuna, which is not installed")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    pytest.importorskip("compressed_tensors", reason="the export needs it, and it is not installed")
    packed = FourBitConfig(activation=None, group_size=16, modules_to_not_convert=("lm_head", "down_proj"))
    args = arguments(tmp_path, max_steps=6, save_strategy="steps", save_steps=6, eval_strategy="steps", eval_steps=6)
    trainer = Trainer(
        model_init=lambda: tiny_llama(),
        args=args,
        train_dataset=RandomTokens(),
        eval_dataset=RandomTokens(rows=4),
        callbacks=[SpikeRecorder(above=1.01), FourBitCallback(packed, export=True)],
    )
    space = {"hp_space": lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2)}}
    trainer.hyperparameter_search(n_trials=2, backend="optuna", hp_name=names, **space)
    folders = ["run-0", "run-1"] if names is None else ["trial0", "trial1"]
    for name in ("spikes.jsonl", "4bit"):
        assert sorted(path.parent.name for path in tmp_path.rglob(name)) == folders
    runs = read_runs([tmp_path])
    assert [run.label for run in runs] == folders
    assert all(run.spikes for run in runs)
