"""The Trainer on two processes against the Trainer on one: DDP, FSDP2, and checkpoints between them."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import Trainer

from hf_stablespam.trainer.callbacks.helpers.unwrapping import unwrap
from tests.processes import run_once, run_processes
from tests.quant.layers.mixtures import TRAINED
from tests.trainer import distributed

KINDS = ("FULL_STATE_DICT", "SHARDED_STATE_DICT")
SAVING = {"save_strategy": "steps", "save_steps": distributed.STEPS // 2}
CHECKPOINT = f"checkpoint-{distributed.STEPS // 2}"


class OwnSchedule(Trainer):
    """Never comes through our `create_scheduler`, which puts the run's steps in the place of `decay_steps=auto`."""

    def create_scheduler(self, num_training_steps, optimizer=None):
        self.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(self.optimizer, factor=1.0)
        return self.lr_scheduler


def keep(folder: Path, name: str, trainer) -> None:
    torch.save(distributed.result_of(trainer), folder / f"{name} {dist.get_rank()}.pt")


def save_on_one(folder: Path) -> None:
    for kind in KINDS:
        distributed.run(folder / f"one {kind}", fsdp=kind, stop_at=distributed.STEPS // 2, **SAVING)


def train_on_two(folder: Path) -> None:
    keep(folder, "ddp", distributed.run(folder / "ddp"))
    for kind in KINDS:
        keep(folder, f"fsdp {kind}", distributed.run(folder / f"two {kind}", fsdp=kind, **SAVING))
        for processes in ("one", "two"):
            checkpoint = folder / f"{processes} {kind}" / CHECKPOINT
            trainer = distributed.run(folder / "resumed", fsdp=kind, resume=str(checkpoint))
            keep(folder, f"{processes} to two {kind}", trainer)
    options = {"fsdp": KINDS[0], "trainer_cls": OwnSchedule}
    for name, more in {"own": SAVING, "own resumed": {"resume": str(folder / "own" / CHECKPOINT)}}.items():
        keep(folder, name, distributed.run(folder / name, **options, **more))
    train_mixtures(folder)


def train_mixtures(folder: Path) -> None:
    """On two processes; those of `train_on_two`, so that no others are started."""
    for mixture in TRAINED:
        name = " ".join(mixture)
        keep(folder, name, distributed.run_mixture(folder / name, *mixture, fsdp=True))
        again = {"resume": str(folder / name / "checkpoint-2"), "save_strategy": "no"}
        keep(folder, f"{name} resumed", distributed.run_mixture(folder / "again", *mixture, fsdp=True, **again))


def resume_on_one(folder: Path) -> None:
    for kind in KINDS:
        checkpoint = folder / f"two {kind}" / CHECKPOINT
        keep(folder, f"two to one {kind}", distributed.run(folder / "resumed", fsdp=kind, resume=str(checkpoint)))


def set_batch_size(checkpoint: Path, processes: int) -> None:
    """transformers 4 resumes with the batch size per device that was saved, and the global batch would change."""
    path = checkpoint / "trainer_state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({**state, "train_batch_size": distributed.GLOBAL_BATCH // processes}))


def all_runs(folder: Path) -> None:
    run_processes(1, save_on_one, folder)
    for kind in KINDS:
        set_batch_size(folder / f"one {kind}" / CHECKPOINT, processes=2)
    run_processes(2, train_on_two, folder)
    for kind in KINDS:
        set_batch_size(folder / f"two {kind}" / CHECKPOINT, processes=1)
    run_processes(1, resume_on_one, folder)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_once(tmp_path_factory, "trainer_processes", all_runs)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The same run in this very process, without a process group."""
    return distributed.result_of(distributed.run(tmp_path_factory.mktemp("single")))


def load(results: Path, name: str, rank: int = 0) -> dict:
    return torch.load(results / f"{name} {rank}.pt")


def assert_same_training(got: dict, wanted: dict) -> None:
    """To float32 rounding. In 4 bits a rounding error can move one activation to the next level of its grid: that
    shows in a few entries of the moments, and is why their bound is absolute."""
    torch.testing.assert_close(got["losses"], wanted["losses"], rtol=0, atol=1e-5)
    torch.testing.assert_close(got["weights"], wanted["weights"], rtol=0, atol=3e-6)
    torch.testing.assert_close(got["states"], wanted["states"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got["statistics"], wanted["statistics"], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("rank", range(2))
@pytest.mark.parametrize("name", ["ddp", *(f"fsdp {kind}" for kind in KINDS)])
def test_two_processes_train_as_one(results, expected, name, rank):
    assert_same_training(load(results, name, rank), expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_fsdp_was_in_fact_sharding(results, expected, kind):
    """accelerate falls back to DDP without a word where it finds no accelerator."""
    assert load(results, f"fsdp {kind}")["sharded"] == sorted(expected["weights"])
    assert load(results, "ddp")["sharded"] == []


@pytest.mark.slow
@pytest.mark.parametrize("rank", range(2))
@pytest.mark.parametrize("kind", KINDS)
def test_resuming_on_as_many_processes_is_exact(results, kind, rank):
    straight, resumed = (load(results, f"{name} {kind}", rank) for name in ("fsdp", "two to two"))
    assert straight["losses"] == resumed["losses"]
    for part in ("weights", "states"):
        torch.testing.assert_close(straight[part], resumed[part], rtol=0, atol=0)


@pytest.mark.slow
def test_resuming_under_a_schedule_of_the_scripts_own(results):
    """torch's distributed checkpoint takes a step before it loads, when nobody has said yet how long the run is."""
    straight, resumed = (load(results, name) for name in ("own", "own resumed"))
    assert straight["losses"] == resumed["losses"]
    assert straight["decay_steps"] == resumed["decay_steps"] == {distributed.STEPS}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["one to two", "two to one"])
def test_resuming_on_another_number_of_processes_goes_on_the_same(results, expected, name, kind):
    assert_same_training(load(results, f"{name} {kind}"), expected)


@pytest.mark.slow
@pytest.mark.parametrize("mixture", TRAINED, ids=" ".join)
def test_a_mixture_on_two_processes(results, tmp_path, mixture):
    """FSDP2 with 4-bit experts trains as one process does, and resumes exactly."""
    two, resumed = load(results, " ".join(mixture)), load(results, f"{' '.join(mixture)} resumed")
    one = distributed.result_of(distributed.run_mixture(tmp_path, *mixture, fsdp=False))
    assert two["sharded"] == sorted(one["weights"])
    torch.testing.assert_close(two["losses"], one["losses"], rtol=0, atol=1e-4)
    torch.testing.assert_close(two["weights"], one["weights"], rtol=0, atol=1e-4)
    assert two["losses"] == resumed["losses"]
    for part in ("weights", "states"):
        torch.testing.assert_close(two[part], resumed[part], rtol=0, atol=0)


def test_the_run_has_what_it_is_to_be_tested_with(expected, tmp_path):
    """A spike that AdaClip catches, and resets: without them the comparison would say less than it claims."""
    trainer = distributed.run(tmp_path, max_steps=distributed.SPIKE_STEP)
    statistics = unwrap(trainer.optimizer).statistics
    assert (statistics["grad_max"] > 5 * statistics["clip_threshold"]).all()
    assert (statistics["clipped"] >= 1).all()
    steps_since_reset = distributed.STEPS % distributed.RESET_INTERVAL + 1  # the reset step's gradient counts
    assert {state["moment_step"].item() for state in expected["states"].values()} == {steps_since_reset}
