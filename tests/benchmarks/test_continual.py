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
    assert "Last accuracy / average accuracy / forgetting, %" in capsys.readouterr().out


def test_every_setting_has_three_seeds():
    runs = list(continual.all_runs(continual.SEEDS))
    assert len(runs) == len({run.key for run in runs}) == 3 * 16
    settings = {(run.optimizer, run.precision, run.algorithm) for run in runs}
    assert len(settings) == 8


def test_the_tables_are_means_over_the_seeds():
    settings = {"optimizer": "stable_spam", "precision": "int4"}
    rows = [
        {key: str(value) for key, value in vars(continual.Run("lae", **settings, seed=seed)).items()}
        | {"answer": "ensemble", "last": str(50 + seed), "average": "60", "forgetting": "10"}
        for seed in range(3)
    ]
    text = continual.table(rows)
    assert text.startswith("So far 3 of 24 runs are on record.\n\n| | AdamW | Stable-SPAM | AdamW, INT4 backbone |")
    assert text.endswith("| ensemble | – | – | – | 51.0 ± 1.0 / 60.0 / 10.0 |")
    assert "So far 0 of 30 runs" in continual.parts_table(rows)
    rows[0] |= {"optimizer": "adamw_torch", "precision": "full", "freeze_epochs": "0"}
    assert "| no frozen epochs | – | – | – | 50.0 / 60.0 / 10.0 |" in continual.parts_table(rows)
