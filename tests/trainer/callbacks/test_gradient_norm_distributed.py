"""The monitoring callbacks on two processes, with DDP and FSDP2: figures of the whole gradient, the same everywhere."""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainerCallback

from hf_stablespam import FourBitCallback, FourBitConfig, GradientNormCallback, SpikeRecorder
from hf_stablespam.monitor.spike_file import read_spikes
from tests.processes import run_once, run_processes
from tests.trainer import distributed
from tests.trainer.helpers import RandomTokens, arguments, tiny_llama, training_logs

RUNS = {
    "ddp stable_spam": {"optim": "stable_spam"},
    "ddp adamw": {"optim": "adamw_torch"},
    "fsdp adamw": {"optim": "adamw_torch", "fsdp": True},
    "fsdp stable_spam": {"optim": "stable_spam", "fsdp": True, "spike_score": "entry"},
}


class KeepWholeGradient(TrainerCallback):
    """Norm and largest entry of the gathered gradients, the slow way."""

    def __init__(self):
        self.norms, self.largest = [], []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        whole = torch.cat([distributed.whole(p.grad).flatten() for p in model.parameters()])
        self.norms.append(whole.norm().item())
        self.largest.append(whole.abs().max().item())


def train(folder: Path, optim: str, fsdp: bool = False, spike_score: str = "tensor") -> dict:
    options = distributed.fsdp_options() if fsdp else {}
    args = arguments(
        folder,
        optim=optim,
        max_steps=10,
        per_device_train_batch_size=4 // int(os.environ.get("WORLD_SIZE", 1)),
        gradient_accumulation_steps=2,
        report_to=["tensorboard"],
        **options,
    )
    if fsdp:
        distributed.let_fsdp_run_on_the_cpu(args)
    keep = KeepWholeGradient()
    callbacks = [
        FourBitCallback(FourBitConfig(group_size=8)),
        GradientNormCallback(by="block", spike_score=spike_score),
        SpikeRecorder(),
        distributed.Spike(),
        keep,
    ]
    trainer = Trainer(model=tiny_llama(), args=args, train_dataset=RandomTokens(), callbacks=callbacks)
    trainer.train()
    figures = [
        {name: value for name, value in row.items() if name.startswith("gradients/")} for row in training_logs(trainer)
    ]
    sharded = any(hasattr(p, "device_mesh") for p in trainer.model.parameters())
    return {"figures": figures, "norms": keep.norms, "largest": keep.largest, "sharded": sharded}


def train_on_two(folder: Path) -> None:
    for name, options in RUNS.items():
        (folder / f"{name}.{os.environ['RANK']}.json").write_text(json.dumps(train(folder / name, **options)))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_once(tmp_path_factory, "monitoring_processes", lambda folder: run_processes(2, train_on_two, folder))


def load(results, name, rank=0):
    return json.loads((results / f"{name}.{rank}.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_figures_are_those_of_the_whole_gradient(results, name):
    found = load(results, name)
    assert found["sharded"] == name.startswith("fsdp")
    assert [row["gradients/norm"] for row in found["figures"]] == pytest.approx(found["norms"], rel=1e-5)
    assert [row["gradients/largest"] for row in found["figures"]] == pytest.approx(found["largest"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_figures_are_equal_on_all_processes(results, name):
    assert load(results, name, 0)["figures"] == load(results, name, 1)["figures"]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_figures_are_those_of_one_process_with_the_same_batches(results, name, tmp_path):
    """Until the spike: it is so large that rounding shows in what follows from it."""
    alone = train(tmp_path, **{key: value for key, value in RUNS[name].items() if key != "fsdp"})
    for one, two in zip(alone["figures"][:8], load(results, name)["figures"], strict=False):
        assert one.keys() == two.keys()
        assert two == pytest.approx(one, rel=2e-3)
    assert len(alone["figures"][0]) > 50


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_files_are_written_once(results, name):
    assert len(list((results / name).rglob("events.out.tfevents*"))) == 1
    spikes = read_spikes(results / name)
    assert {spike["step"] for spike in spikes} == {distributed.SPIKE_STEP}
    assert len({spike["tensor"] for spike in spikes}) == len(spikes) == 8
    assert [spike["score"] for spike in spikes] == sorted((spike["score"] for spike in spikes), reverse=True)


@pytest.mark.slow
def test_a_spike_names_the_data_of_all_processes(results, tmp_path):
    train(tmp_path, optim="adamw_torch")
    alone, both = read_spikes(tmp_path)[0], read_spikes(results / "ddp adamw")[0]
    assert alone["tensor"] == both["tensor"]
    assert len(both["data_indices"]) == 8
    assert sorted(both["data_indices"]) == sorted(alone["data_indices"])
    assert both["loss"] == pytest.approx(alone["loss"], rel=1e-4)
    assert both["magnitude"] == pytest.approx(alone["magnitude"], rel=1e-2)
