"""The figures where people look at them, read back with each tool's own reader from the files that it wrote."""

import json
import struct
import uuid

import pytest

from hf_stablespam import GradientNormCallback, StableSPAM
from tests.trainer.callbacks.gradient_helpers import Spike
from tests.trainer.helpers import tiny_trainer, training_logs

NAMES = ("norm", "norm_max", "stable_norm_mean", "clipped", "clipped_share", "update_ratio", "norm/model.layers.1")


def train(folder, *report_to, **overrides):
    trainer = tiny_trainer(
        folder,
        callbacks=[GradientNormCallback(by="block"), Spike([4])],
        report_to=list(report_to),
        logging_steps=2,
        **overrides,
    )
    trainer.train()
    return trainer


def expected(rows, name):
    """Steps and values; the infinite gradient of step 4 leaves no norm there."""
    key = f"gradients/{name}"
    return [(row["step"], pytest.approx(row[key], rel=1e-5)) for row in rows if key in row]


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = training_logs(train(tmp_path, "tensorboard"))
    (event_file,) = tmp_path.rglob("events.out.tfevents*")
    events = EventAccumulator(str(event_file)).Reload()
    for name in NAMES:
        read = [(event.step, event.value) for event in events.Scalars(f"train/gradients/{name}")]
        assert read == expected(rows, name)
    assert [step for step, _ in expected(rows, "norm")] == [2, 6]


def test_trainer_state_is_json_that_any_reader_takes(tmp_path):
    trainer = train(tmp_path, save_strategy="steps", save_steps=6)

    def fail(constant):
        raise AssertionError(f"{constant} is no JSON")

    text = (tmp_path / "checkpoint-6" / "trainer_state.json").read_text()
    saved = json.loads(text, parse_constant=fail)
    assert [row for row in saved["log_history"] if "loss" in row] == training_logs(trainer)


def wandb_rows(path):
    """The history in a `.wandb` file: framed like a LevelDB log, after 7 bytes, in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, part = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        room = 32768 - place % 32768
        if room < 7:
            place += room
            continue
        size, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        part += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            record, part = Record.FromString(part), b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                yield {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def test_wandb_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="Weights & Biases is not installed: pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    rows = training_logs(train(tmp_path / "out", "wandb"))
    wandb.teardown()  # unlike `finish` it waits until the file is written
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    read = list(wandb_rows(path))
    for name in NAMES:
        key = f"train/gradients/{name}"
        assert [(row["train/global_step"], row[key]) for row in read if key in row] == expected(rows, name)


def test_trackio(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip("trackio", reason="trackio is not installed: pip install trackio")
    from trackio.sqlite_storage import SQLiteStorage

    # Of its own: where another test has imported trackio before, runs of earlier days lie in the folder that it reads.
    project = f"spikes-{uuid.uuid4().hex}"
    rows = training_logs(train(tmp_path / "out", "trackio", project=project, run_name="tiny"))
    read = SQLiteStorage.get_logs(project, "tiny")
    for name in NAMES:
        key = f"train/gradients/{name}"
        assert [(row["train/global_step"], row[key]) for row in read if key in row] == expected(rows, name)


def test_figures_are_before_the_reporters_after_a_second_callback_was_added(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=2, report_to=["tensorboard"])
    order = [type(callback) for callback in trainer.callback_handler.callbacks]
    trainer.add_callback(GradientNormCallback(updates=False))
    trainer.train()
    assert [type(callback) for callback in trainer.callback_handler.callbacks] == [GradientNormCallback, *order]


def test_stable_spam_without_clipping_logs_no_threshold(tmp_path):
    """It is infinite, which is no JSON."""
    trainer = tiny_trainer(tmp_path, callbacks=[GradientNormCallback()], optim_args="clip_beta=none", max_steps=2)
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, StableSPAM)
    assert not [key for row in training_logs(trainer) for key in row if "clip_threshold" in key]
