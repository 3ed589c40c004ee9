import csv

import pytest

from benchmarks import _record, continual

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")


def test_runs_are_recorded_once_and_summed_up(tmp_path, monkeypatch, capsys):
    for module in (_record, continual):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    runs = [
        continual.Run("naive", seed=3, pretraining_steps=2),
        continual.Run("lae", "stable_spam", "int4", freeze_epochs=0, seed=3, pretraining_steps=2),
    ]
    monkeypatch.setattr(continual, "all_runs", lambda seeds: iter(runs))
    args = continual.TrainingArguments
    monkeypatch.setattr(continual, "TrainingArguments", lambda folder, **options: args(folder, **options, max_steps=2))
    for _ in range(2):  # the second time nothing is left to do
        continual.main([])
    with (tmp_path / "continual.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["answer"] for row in rows] == ["naive", "online", "offline", "ensemble"]
    assert all(len(row["accuracy_after_each_task"].split()) == 5 for row in rows)
    assert all(0 <= float(row["last"]) <= 100 for row in rows)
    assert "| stable_spam | int4 | lora | 0 | True | 0.002 | 2 | ensemble | 1 |" in capsys.readouterr().out


def test_every_setting_has_three_seeds():
    runs = list(continual.all_runs(continual.SEEDS))
    assert len(runs) == len({run.key for run in runs}) == 3 * 16
    settings = {(run.optimizer, run.precision, run.algorithm) for run in runs}
    assert len(settings) == 8
