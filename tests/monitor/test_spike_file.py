"""spikes.jsonl: bounded, whole after a crash, read without surprise."""

import json
import math
import os
import subprocess
import sys

import pytest

from hf_stablespam.monitor.spike_file import Spike, SpikeFile, read_spikes


def spike(step, **fields):
    return Spike(
        **{
            "step": step,
            "tensor": "lm_head.weight",
            "magnitude": 9.5,
            "threshold": 1.5,
            "score": 12.0,
            "loss": 3.25,
            "learning_rate": 1e-3,
            "data_indices": [4, 7],
            **fields,
        }
    )


def steps(path):
    return [row["step"] for row in read_spikes(path)]


def test_what_was_written_is_read(tmp_path):
    SpikeFile(tmp_path / "spikes.jsonl", keep=10).append([spike(3)])
    (row,) = read_spikes(tmp_path)
    assert row == {
        "step": 3,
        "tensor": "lm_head.weight",
        "magnitude": 9.5,
        "threshold": 1.5,
        "score": 12.0,
        "loss": 3.25,
        "learning_rate": 1e-3,
        "data_indices": [4, 7],
    }
    assert read_spikes(tmp_path / "spikes.jsonl") == [row]


def test_no_file_means_no_spikes(tmp_path):
    assert read_spikes(tmp_path) == []
    SpikeFile(tmp_path / "spikes.jsonl", keep=10).append([])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("at_once", [1, 2, 7])
def test_never_more_lines_than_asked_for(tmp_path, at_once):
    file = SpikeFile(tmp_path / "spikes.jsonl", keep=5)
    for first in range(0, 28, at_once):
        file.append([spike(step) for step in range(first, first + at_once)])
        assert len(file.path.read_text().splitlines()) <= 5
    assert steps(tmp_path) == [23, 24, 25, 26, 27]
    assert [path.name for path in tmp_path.iterdir()] == ["spikes.jsonl"]


def test_numbers_that_json_does_not_have_are_null(tmp_path):
    SpikeFile(tmp_path / "spikes.jsonl", keep=5).append([spike(1, loss=math.nan, threshold=math.inf)])
    (line,) = (tmp_path / "spikes.jsonl").read_text().splitlines()
    row = json.loads(line, parse_constant=pytest.fail)
    assert row["loss"] is None
    assert row["threshold"] is None


@pytest.mark.parametrize("rest", ['{"step": 9, "ten', '{"step": 9}', "\x00\x00\x00", "[1]\n", '{"tensor": "a"}\n'])
def test_a_line_that_was_cut_off_harms_no_other(tmp_path, rest):
    path = tmp_path / "spikes.jsonl"
    SpikeFile(path, keep=5).append([spike(1), spike(2)])
    whole = len(read_spikes(path))
    with path.open("a") as file:
        file.write(rest)
    found = steps(path)
    assert found[:whole] == [1, 2]
    SpikeFile(path, keep=5).append([spike(12)])
    assert steps(path) == [*found, 12]
    assert len(path.read_text().splitlines()) == len(found) + 1


def test_a_process_that_is_killed_leaves_whole_lines(tmp_path):
    """It dies right after a write, without closing anything."""
    code = """
import os, sys
from pathlib import Path
from hf_stablespam.monitor.spike_file import Spike, SpikeFile

file = SpikeFile(Path(sys.argv[1]), keep=100)
for step in range(1, 30):
    file.append([Spike(step, "w", 1.0, 1.0, 1.0, 1.0, 1.0, list(range(50)))])
os.kill(os.getpid(), 9)
"""
    path = tmp_path / "spikes.jsonl"
    subprocess.run([sys.executable, "-c", code, str(path)], check=False, capture_output=True)
    assert steps(path) == list(range(1, 30))


def test_an_interrupted_replacement_leaves_the_old_file(tmp_path, monkeypatch):
    file = SpikeFile(tmp_path / "spikes.jsonl", keep=2)
    file.append([spike(1), spike(2)])
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        file.append([spike(3)])
    assert steps(tmp_path) == [1, 2]
    monkeypatch.undo()
    file.append([spike(4)])
    assert steps(tmp_path) == [2, 4]


def test_spikes_after_a_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "spikes.jsonl"
    SpikeFile(path, keep=9).append([spike(step) for step in (2, 5, 5, 8)])
    file = SpikeFile(path, keep=9)
    file.drop_after(5)
    assert steps(path) == [2, 5, 5]
    file.append([spike(8)])
    assert steps(path) == [2, 5, 5, 8]
    SpikeFile(tmp_path / "other.jsonl", keep=9).drop_after(3)
    assert not (tmp_path / "other.jsonl").exists()


def test_a_file_that_was_deleted_is_begun_anew(tmp_path):
    """With its folder, too: a run does not end because somebody has tidied up."""
    file = SpikeFile(tmp_path / "run" / "spikes.jsonl", keep=10)
    file.append([spike(3)])
    file.path.unlink()
    file.append([spike(5)])
    file.append([spike(6)])
    assert steps(file.path) == [5, 6]
    file.path.unlink()
    file.path.parent.rmdir()
    file.append([spike(8)])
    assert steps(file.path) == [8]
