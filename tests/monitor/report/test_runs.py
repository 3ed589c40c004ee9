import json
import os
import pickle

import pytest
import torch
from transformers import TrainingArguments

from hf_stablespam.monitor.report.runs import read_runs

from .report_data import write_run


@pytest.mark.parametrize("target", ["", "trainer_state.json"])
def test_a_run_is_given_by_its_folder_or_its_file(tmp_path, target):
    (run,) = read_runs([write_run(tmp_path / "adamw") / target])
    assert run.label == "adamw"
    assert run.series("eval_loss")[0] == list(range(10, 121, 10))


def test_a_folder_of_runs_stands_for_them_all(tmp_path):
    for name in ("b", "a"):
        write_run(tmp_path / name)
    (tmp_path / "no_run").mkdir()
    assert [run.label for run in read_runs([tmp_path])] == ["a", "b"]


def test_an_unfinished_run_is_read_from_its_newest_checkpoint(tmp_path):
    write_run(tmp_path / "run" / "checkpoint-90", steps=90)
    write_run(tmp_path / "run" / "checkpoint-100", steps=100)
    (run,) = read_runs([tmp_path / "run"])
    assert run.label == "run"
    assert run.last("step") == 100


def test_a_resumed_run_is_read_from_what_was_written_last(tmp_path):
    write_run(tmp_path / "run", steps=50)
    os.utime(tmp_path / "run" / "trainer_state.json", (1, 1))
    write_run(tmp_path / "run" / "checkpoint-60", steps=60)
    assert read_runs([tmp_path / "run"])[0].last("step") == 60


def test_runs_of_the_same_name_are_told_apart_by_their_folders(tmp_path):
    paths = [write_run(tmp_path / parent / "run") for parent in ("first", "second")]
    assert [run.label for run in read_runs(paths)] == ["first/run", "second/run"]


def test_two_checkpoints_of_one_run_are_told_apart(tmp_path):
    paths = [write_run(tmp_path / "run" / f"checkpoint-{step}") for step in (10, 20)]
    assert len({run.label for run in read_runs(paths)}) == 2


def test_a_step_logged_twice_has_its_last_value(tmp_path):
    rows = [{"step": 5, "loss": 3.0}, {"step": 1, "loss": 4.0}, {"step": 5, "loss": 2.0}]
    (run,) = read_runs([write_run(tmp_path, rows)])
    assert run.series("loss") == ([1, 5], [4.0, 2.0])


def test_what_is_no_number_is_left_out(tmp_path):
    rows = [{"step": 1, "loss": 3.0, "name": "x", "flag": True, "list": [1]}, {"loss": 1.0}]
    (run,) = read_runs([write_run(tmp_path, rows)])
    assert run.rows == [{"step": 1, "loss": 3.0}]


def test_the_hyperparameters_come_from_the_saved_arguments(tmp_path):
    folder = write_run(tmp_path / "run")
    arguments = TrainingArguments(
        str(folder),
        optim="adamw_torch",
        learning_rate=3e-4,
        lr_scheduler_type="cosine",
        hub_token="hf_secret",
        use_cpu=True,
    )
    torch.save(arguments, folder / "training_args.bin")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 128, "torch_dtype": "x"}))
    (run,) = read_runs([folder])
    assert run.settings["optim"] == "adamw_torch"
    assert run.settings["learning_rate"] == "0.0003"
    assert run.settings["lr_scheduler_type"] == "cosine"
    assert run.settings["model.hidden_size"] == "128"
    assert "hf_secret" not in str(run.settings)


def test_secrets_in_dictionaries_are_left_out_too(tmp_path):
    folder = write_run(tmp_path / "run")
    arguments = TrainingArguments(str(folder), hub_token="hf_secret", use_cpu=True)
    kept = {"monkey": 1, "keep_last": 2, "label_names": ["a"], "rate": 0.5}
    hidden = {"token": "hf_secret", "apiKey": "hf_secret", "secret": "hf_secret", "db_password": "hf_secret"}
    arguments.model_init_kwargs = {**hidden, **kept, "config": [{"hub-token": "hf_secret", "tokens": 3}]}
    arguments.wandb_api_key = arguments.push_to_hub_token = "hf_secret"
    torch.save(arguments, folder / "training_args.bin")
    (run,) = read_runs([folder])
    assert "hf_secret" not in str(run.settings)
    assert run.settings["model_init_kwargs"] == str({**kept, "config": [{"tokens": 3}]})
    assert "wandb_api_key" not in run.settings
    assert "label_names" in run.settings


class _Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_nothing_in_the_saved_arguments_is_executed(tmp_path):
    folder = write_run(tmp_path / "run")
    torch.save({"arguments": _Attack(str(tmp_path / "owned"))}, folder / "training_args.bin")
    assert read_runs([folder])[0].settings == {"max_steps": "120"}
    assert not (tmp_path / "owned").exists()
    pickle.loads(pickle.dumps(_Attack(str(tmp_path / "owned"))))
    assert (tmp_path / "owned").exists(), "the attack is a real one"


def test_damaged_arguments_are_done_without(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "training_args.bin").write_bytes(b"PK\x03\x04 cut off")
    assert read_runs([folder])[0].settings == {"max_steps": "120"}


def test_spikes_are_read_up_to_a_line_that_was_cut_off(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "spikes.jsonl").write_text('{"step": 3, "name": "w"}\n{"step": "x"}\n[1]\n{"step": 7, "na')
    assert [spike["step"] for spike in read_runs([folder])[0].spikes] == [3]


def test_the_spikes_of_a_checkpoints_run_lie_beside_it(tmp_path):
    write_run(tmp_path / "run" / "checkpoint-10")
    (tmp_path / "run" / "spikes.jsonl").write_text('{"step": 3}\n')
    assert len(read_runs([tmp_path / "run"])[0].spikes) == 1


def test_a_path_that_does_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"RUN must be a folder or a trainer_state\.json, got .*nothing, which"):
        read_runs([tmp_path / "nothing"])


def test_a_folder_without_runs(tmp_path):
    (tmp_path / "logs").mkdir()
    with pytest.raises(FileNotFoundError, match=r"RUN must hold a trainer_state\.json.* which has none; the Trainer"):
        read_runs([tmp_path])


def test_a_run_given_twice(tmp_path):
    folder = write_run(tmp_path / "run")
    with pytest.raises(ValueError, match=r"each run must be given once, got .*run.* twice"):
        read_runs([folder, folder / "trainer_state.json"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"log_history": [{"step": 1, "lo', "must be valid JSON, it is broken or truncated"),
        (b"", "must be valid JSON, it is broken or truncated"),
        (b"\xff\xfe\x00", "must be valid JSON, it is broken or truncated"),
        (b"[1, 2]", "must have a log_history"),
        (b'{"max_steps": 3}', "must have a log_history"),
        (b'{"log_history": [1]}', "must have a log_history"),
    ],
    ids=["truncated", "empty", "binary", "a list", "no history", "no rows"],
)
def test_a_broken_state(tmp_path, content, message):
    (tmp_path / "trainer_state.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"{message}.* give one of the run's checkpoints"):
        read_runs([tmp_path])
