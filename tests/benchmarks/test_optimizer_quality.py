"""The benchmark of quality: what it runs, what it does not repeat, and the table it makes of the record."""

import pytest

from benchmarks import _record, optimizer_quality


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Pretend pretrainings: the loss is the distance of the learning rate from 3e-3, and a bit for the seed."""
    made = []

    def train(method, corpus, learning_rate, seed, steps):
        made.append((learning_rate, seed))
        diverged = learning_rate == 1e-2 and method.optim == "adamw_torch"
        loss = float("nan") if diverged else 3 + 100 * abs(learning_rate - 3e-3) + (seed - 42) / 100
        return {"eval_loss": loss, "seconds_per_step": 0.1}

    monkeypatch.setattr(optimizer_quality, "train", train)
    monkeypatch.setattr(optimizer_quality, "load_standard_library", lambda size: None)
    monkeypatch.setattr(optimizer_quality, "RESULTS", tmp_path)
    monkeypatch.setattr(_record, "RESULTS", tmp_path)
    return made


def test_three_learning_rates_then_three_seeds_at_the_best(runs, capsys):
    optimizer_quality.main(["--methods", "adamw", "stable_spam", "--steps", "7"])
    each = [(1e-3, 42), (3e-3, 42), (1e-2, 42), (3e-3, 43), (3e-3, 44)]
    assert runs == [*each, *each]
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert lines[0].split()[:6] == ["adamw", "0.003", "3.010", "3.000", "3.020", "3"]
    assert "0.01: inf" in lines[0]
    assert "0.01: 3.700" in lines[1]


def test_what_is_on_record_is_not_run_again(runs):
    optimizer_quality.main(["--methods", "adamw", "--steps", "7", "--seeds", "1"])
    assert len(runs) == 3
    optimizer_quality.main(["--methods", "adamw", "--steps", "7"])
    assert runs[3:] == [(3e-3, 43), (3e-3, 44)]
    optimizer_quality.main(["--methods", "adamw", "--steps", "8", "--seeds", "1"])
    assert len(runs) == 8


def test_the_table_alone_runs_nothing(runs, capsys):
    optimizer_quality.main(["--table"])
    assert runs == []
    assert capsys.readouterr().out.startswith("method")


def test_a_method_without_its_options_would_not_be_that_method():
    methods = optimizer_quality.METHODS
    assert "clip_beta=none,norm_betas=none" in methods["galore"].optim_args
    assert "rank=32" in methods["galore_stable_spam"].optim_args
    assert [name for name, method in methods.items() if method.stabilized] == ["adamw_stabilized", "lion_stabilized"]
