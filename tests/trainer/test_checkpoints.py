"""`last_complete_checkpoint`: every file cut short or missing is noticed, named, passed over and left alone."""

import json
import logging
import shutil

import pytest
from transformers.trainer_utils import get_last_checkpoint

from hf_stablespam import last_complete_checkpoint
from hf_stablespam.trainer.checkpoints import last_checkpoint_with_weights
from tests.trainer.helpers import tiny_trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with checkpoints at the steps 2 and 4."""
    folder = tmp_path_factory.mktemp("run")
    tiny_trainer(folder, max_steps=4, save_strategy="steps", save_steps=2).train()
    return folder


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_newest_checkpoint_where_all_are_complete(run, caplog):
    assert last_complete_checkpoint(run) == get_last_checkpoint(str(run)) == str(run / "checkpoint-4")
    assert not caplog.records


def test_none_where_there_is_nothing(tmp_path):
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    assert last_complete_checkpoint(tmp_path) is None
    assert last_complete_checkpoint(tmp_path / "missing") is None


@pytest.mark.parametrize(("before", "found"), [(5, "checkpoint-4"), (4, "checkpoint-2"), (2, None)])
def test_only_those_before_a_step(run, before, found):
    assert last_complete_checkpoint(run, before=before) == (found and str(run / found))


def test_the_order_is_that_of_numbers(copy):
    shutil.copytree(copy / "checkpoint-4", copy / "checkpoint-10")
    state = json.loads((copy / "checkpoint-10" / "trainer_state.json").read_text())
    (copy / "checkpoint-10" / "trainer_state.json").write_text(json.dumps({**state, "global_step": 10}))
    assert last_complete_checkpoint(copy) == str(copy / "checkpoint-10")


BROKEN = {
    "trainer_state.json": "trainer_state.json is cut short",
    "model.safetensors": "model.safetensors is cut short",
    "optimizer.pt": "optimizer.pt is cut short",
    "scheduler.pt": "scheduler.pt is cut short",
    "rng_state.pth": "rng_state.pth is cut short",
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.999])
def test_a_file_cut_short_is_noticed(copy, caplog, name, share):
    path = copy / "checkpoint-4" / name
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    before = contents(copy)
    with caplog.at_level(logging.WARNING, logger="hf_stablespam"):
        assert last_complete_checkpoint(copy) == str(copy / "checkpoint-2")
    (record,) = caplog.records
    message = f"checkpoint {copy / 'checkpoint-4'} is not complete and is passed over: {BROKEN[name]}"
    assert record.getMessage() == message
    assert contents(copy) == before


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("trainer_state.json", "trainer_state.json, which is written last, is missing"),
        ("model.safetensors", "it has no weights"),
        ("optimizer.pt", "it has no optimizer state (as with save_only_model=True)"),
    ],
)
def test_a_missing_file_is_noticed(copy, caplog, name, problem):
    (copy / "checkpoint-4" / name).unlink()
    assert last_complete_checkpoint(copy) == str(copy / "checkpoint-2")
    assert problem in caplog.text


def test_for_an_export_the_weights_are_enough(copy):
    (copy / "checkpoint-4" / "optimizer.pt").unlink()
    assert last_checkpoint_with_weights(copy) == str(copy / "checkpoint-4")
    (copy / "checkpoint-4" / "model.safetensors").unlink()
    assert last_checkpoint_with_weights(copy) == str(copy / "checkpoint-2")


@pytest.mark.parametrize("name", ["notes.bin", "embeddings.pt", "teacher.safetensors", "vocab.pth"])
def test_a_file_of_somebody_elses_is_no_part_of_it(copy, caplog, name):
    (copy / "checkpoint-4" / name).write_bytes(b"not written by the Trainer")
    assert last_complete_checkpoint(copy) == str(copy / "checkpoint-4")
    assert not caplog.records


def test_weights_of_somebody_elses_are_none(copy):
    (copy / "checkpoint-4" / "model.safetensors").rename(copy / "checkpoint-4" / "teacher.safetensors")
    assert last_complete_checkpoint(copy) == str(copy / "checkpoint-2")


def test_a_folder_renamed_is_noticed(copy, caplog):
    (copy / "checkpoint-4").rename(copy / "checkpoint-5")
    assert last_complete_checkpoint(copy) == str(copy / "checkpoint-2")
    assert "trainer_state.json says step 4" in caplog.text


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        (
            {"model.safetensors.index.json": '{"weight_map": {"w": "model-00002-of-00002.safetensors"}}'},
            "model-00002-of-00002.safetensors is missing",
        ),
        ({"model.safetensors.index.json": '{"weight_map": {"w": "mod'}, "model.safetensors.index.json is cut short"),
        ({"pytorch_model_fsdp_0/__0_0.distcp": ""}, "pytorch_model_fsdp_0/.metadata, which is written last, is missi"),
        ({"optimizer_0/__0_0.distcp": ""}, "optimizer_0/.metadata, which is written last, is missing"),
        ({"rng_state_0.pth": None}, "rng_state_1.pth is missing"),
    ],
)
def test_what_many_files_and_processes_leave_is_noticed(copy, caplog, files, problem):
    for name, text in files.items():
        path = copy / "checkpoint-4" / name
        path.parent.mkdir(exist_ok=True)
        if text is None:
            shutil.copy(copy / "checkpoint-4" / "rng_state.pth", path)
        else:
            path.write_text(text)
    assert last_complete_checkpoint(copy) == str(copy / "checkpoint-2")
    assert problem in caplog.text


def test_none_where_no_checkpoint_is_complete(copy):
    for checkpoint in copy.glob("checkpoint-*"):
        (checkpoint / "trainer_state.json").unlink()
    assert last_complete_checkpoint(copy) is None


def give_random_states(checkpoint, *processes):
    for process in processes:
        shutil.copy(checkpoint / "rng_state.pth", checkpoint / f"rng_state_{process}.pth")


@pytest.mark.parametrize(
    ("processes", "environment", "missing"),
    [
        ([0, 1, 3], {}, 2),
        ([0, 1], {"WORLD_SIZE": "4"}, 2),
        ([0, 1, 2], {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, 3),
        ([0, 1, 2], {}, None),
        ([0, 1, 2], {"WORLD_SIZE": "2"}, None),  # goes on with fewer
        ([4, 5, 6, 7], {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, None),  # of a node with a disk of its own
    ],
)
def test_each_process_has_its_random_state(copy, caplog, monkeypatch, processes, environment, missing):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    give_random_states(copy / "checkpoint-4", *processes)
    found = "checkpoint-4" if missing is None else "checkpoint-2"
    assert last_complete_checkpoint(copy) == str(copy / found)
    assert (f"rng_state_{missing}.pth is missing" in caplog.text) == (missing is not None)


def test_a_run_goes_on_with_more_processes_than_have_written_it(copy, monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    for step in (2, 4):
        give_random_states(copy / f"checkpoint-{step}", 0, 1)
    assert last_complete_checkpoint(copy) == str(copy / "checkpoint-4")


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2])
@pytest.mark.parametrize("header", [b"[]", b"{}", b'{"w": 1}'])
def test_a_header_of_another_form_is_noticed(copy, caplog, length, header):
    weights = copy / "checkpoint-4" / "model.safetensors"
    weights.write_bytes(length.to_bytes(8, "little") + header + bytes(3))
    assert last_complete_checkpoint(copy) == str(copy / "checkpoint-2")
    assert "model.safetensors is cut short" in caplog.text


@pytest.mark.parametrize("state", ["null", "[4]", "4"])
def test_a_state_of_another_form_is_noticed(copy, caplog, state):
    (copy / "checkpoint-4" / "trainer_state.json").write_text(state)
    assert last_complete_checkpoint(copy) == str(copy / "checkpoint-2")
    assert "trainer_state.json holds no state" in caplog.text
