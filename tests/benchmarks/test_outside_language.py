"""The benchmark outside language models: its data, its queue and its table."""

import pytest
import torch

from benchmarks import _record, outside_language
from benchmarks.outside_language import OPTIMIZERS, RATES, SEEDS, SEVERITIES, Run


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Pretend trainings: 3e-3 errs least, and Stable-SPAM less than the others."""
    runs = []

    def train(run):
        runs.append(run)
        error = abs(run.learning_rate - 3e-3) + 1 - 0.1 * (run.optimizer == "stable_spam")
        return {**vars(run), "test_error": error, "seconds": 1}

    monkeypatch.setattr(outside_language, "train", train)
    monkeypatch.setattr(_record, "RESULTS", tmp_path)
    return runs


def test_all_rates_then_all_seeds_at_the_best_and_nothing_twice(made, capsys):
    outside_language.main(["--tasks", "digits"])
    settings = len(SEVERITIES) * len(OPTIMIZERS)
    assert len(made) == len(set(made)) == settings * (len(RATES) + len(SEEDS) - 1)
    assert "| 5 | `stable_spam` | 0.003 | 5 | 0.9000 | 0.0000 | 0.90 | 0.00 |" in capsys.readouterr().out
    outside_language.main(["--tasks", "digits"])
    assert len(made) == len(set(made))


def test_the_table_alone_runs_nothing(made):
    outside_language.main(["--table"])
    assert made == []


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("task", ["series", "digits"])
def test_a_few_real_steps_learn_something(task, optimizer):
    if task == "digits":
        pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    barely, little = (
        float(outside_language.train(Run(task, 2.0, optimizer, 3e-3, 0, steps))["test_error"]) for steps in (4, 40)
    )
    assert little < barely


def test_anomalies_hit_a_tenth_and_grow_with_the_severity():
    inputs = torch.ones(100, 100)
    changed = outside_language.with_anomalies(inputs, 5.0, torch.Generator().manual_seed(0)) - inputs
    assert 0.09 < (changed != 0).float().mean() < 0.11
    assert 4.5 < changed[changed != 0].std() < 5.5
    assert torch.equal(outside_language.with_anomalies(inputs, 0.0, torch.Generator()), inputs)


def test_test_series_are_not_among_the_training_ones():
    train, _, test, _ = outside_language.series(0)
    assert train.shape == (1000, 96, 4)
    assert not any((train == window).all((1, 2)).any() for window in test[:20])
