"""The fault benchmark: what it damages, that it goes on where it stopped, and its table."""

import csv

import numpy as np
import pytest
import torch

from benchmarks import _record, fault_methods, faults
from hf_stablespam import FourBitLinear

STEPS = 10


class Tokenizer:
    """What the model asks of one."""

    bos_token_id = eos_token_id = pad_token_id = 0

    def __len__(self):
        return faults.VOCABULARY


@pytest.fixture
def corpus(monkeypatch):
    tokens = np.random.default_rng(0).integers(faults.VOCABULARY, size=STEPS * faults.BATCH * faults.BLOCK * 2)
    train, validation = tokens.astype(np.uint16), tokens[:4096].astype(np.uint16)
    made = faults.Corpus(Tokenizer(), train, validation)
    monkeypatch.setattr(faults, "load_standard_library", lambda vocabulary: made)
    return made


@pytest.mark.parametrize(
    ("fault", "values"),
    [
        ("entry x 1e4", [1, -2e4, 0.5]),
        ("tensor x 1e3", [1e3, -2e3, 500]),
        ("nan", [1, torch.nan, 0.5]),
        ("inf", [1, torch.inf, 0.5]),
        ("zeros", [0, 0, 0]),
    ],
)
def test_each_fault_does_what_its_name_says(monkeypatch, fault, values):
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: torch.tensor(1))
    grads = [torch.tensor([1, -2, 0.5]), torch.ones(2)]
    faults.FAULTS[fault](grads, grads[0], torch.Generator())
    torch.testing.assert_close(grads[0], torch.tensor(values, dtype=torch.float32), equal_nan=True)
    assert grads[1].tolist() == ([0, 0] if fault == "zeros" else [1, 1])


def test_adamw_is_lost_to_a_nan_and_stable_spam_is_not(corpus):
    lost = faults.train(faults.Run("AdamW", "nan", 0.2, seed=0, steps=STEPS), corpus)
    kept = faults.train(faults.Run("Stable-SPAM", "nan", 0.2, seed=0, steps=STEPS), corpus)
    assert not lost["survived"]
    assert lost["nan_steps"] > 0
    assert np.isfinite(kept["final_loss"])
    assert kept["nan_steps"] == 0


def test_the_model_is_the_demos(corpus):
    model = faults.demo_llama(corpus.tokenizer, seed=0)
    assert sum(param.numel() for param in model.parameters()) == 1_328_256
    assert sum(isinstance(module, FourBitLinear) for module in model.modules()) == 28


def test_an_interrupted_benchmark_goes_on_where_it_stopped(corpus, tmp_path, monkeypatch, capsys):
    for module in (_record, faults):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    runs = [faults.Run("AdamW", faults.CLEAN, 0.0, 0, 2), faults.Run("Stable-SPAM", "zeros", 0.05, 0, 2)]
    for limit in (1, 2):
        monkeypatch.setattr(faults, "all_runs", lambda seeds, steps, limit=limit: runs[:limit])
        faults.main(["--steps", "2"])
    with open(tmp_path / "faults.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["optimizer"], row["fault"], row["steps"]) for row in rows] == [
        ("AdamW", "none", "2"),
        ("Stable-SPAM", "zeros", "2"),
    ]
    assert "| none | 0% | " in capsys.readouterr().out


def test_a_run_of_another_length_is_another_run(corpus, tmp_path, monkeypatch):
    for module in (_record, faults):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(faults, "all_runs", lambda seeds, steps: [faults.Run("AdamW", faults.CLEAN, 0.0, 0, steps)])
    for steps in ("1", "2", "1"):
        faults.main(["--steps", steps])
    assert [row["steps"] for row in faults.read(tmp_path / "faults.csv")] == ["1", "2"]


def test_the_table_says_what_was_lost():
    def row(survived, loss, nan_steps):
        named = {"optimizer": "AdamW", "fault": "nan", "rate": "0.05", "survived": survived, "steps": "100"}
        return {**named, "final_loss": loss, "nan_steps": nan_steps}

    lost, kept = row("False", "nan", "60"), row("True", "4.5", "0")
    assert "| nan | 5% | lost (60 nan steps) | – |" in faults.table([lost, lost])
    assert "| nan | 5% | 4.500, 1 of 2 (30 nan steps) | – |" in faults.table([lost, kept])
    assert "| nan | 5% | 4.500 | – |" in faults.table([kept, kept])


def test_every_combination_runs_once():
    runs = list(faults.all_runs(faults.SEEDS))
    assert len(runs) == len(set(runs)) == 3 * 4 * (1 + 5 * 3) + 3 * (1 + 5)
    assert {run.steps for run in faults.all_runs(faults.SEEDS, steps=20)} == {20}
    assert {run.rate for run in runs} == {0.0, *faults.RATES}


def test_the_verdict_compares_each_seed_with_its_own_clean_run():
    def row(fault, rate, seed, loss, survived="True", steps="500"):
        named = {"optimizer": "Stable-SPAM", "fault": fault, "rate": rate, "seed": seed, "steps": steps}
        return {**named, "final_loss": loss, "survived": survived}

    rows = [row("none", "0.0", "0", "4.0"), row("none", "0.0", "1", "5.0"), row("nan", "0.2", "0", "nan", "False")]
    assert (
        faults.verdict(rows) == "Stable-SPAM survived 2 of 3 runs; with 5% spikes over 500 steps, 0 runs: not yet run"
    )
    rows += [row("entry x 1e4", "0.05", "0", "4.02"), row("tensor x 1e3", "0.05", "1", "4.9")]
    rows += [row("none", "0.0", "2", "6.0", steps="100"), row("entry x 1e4", "0.05", "2", "6.6", steps="100")]
    assert faults.verdict(rows).endswith("with 5% spikes over 500 steps, 2 runs: at most +0.50% of its clean loss")


def test_the_bounds_table_has_a_column_for_each_seed():
    def row(fault, rate, seed, loss):
        return {
            "optimizer": "Stable-SPAM",
            "fault": fault,
            "rate": rate,
            "seed": seed,
            "steps": "500",
            "final_loss": loss,
        }

    rows = [row("none", "0.0", "0", "4.0"), row("none", "0.0", "1", "5.0"), row("nan", "0.05", "1", "4.95")]
    lines = faults.bound_table(rows).splitlines()
    assert lines[0] == "| 5 % of 500 steps | seed 0 | seed 1 |"
    assert lines[2] == "| none: the loss | 4.0 | 5.0 |"
    assert "| nan | – | -1.00% |" in lines


def test_parts_and_what_one_would_take_instead_run_once_each():
    runs = list(faults.part_runs((0,)))
    assert len(runs) == len(set(runs)) == 7 * (1 + 2 * 2 + 2)
    assert {run.times for run in runs} == {1, 2, 4}


def test_adagc_holds_a_tensor_to_its_own_norms():
    """By hand: the mean begins as the smallest norm of the first phase; a spike passes with 1.05 times the mean."""
    param = torch.nn.Parameter(torch.zeros(2))
    clip = fault_methods.AdaGC(steps=20)  # two steps of clipping to a norm of 1
    for grad, passed in (([0.6, 0.8], 1.0), ([0.3, 0.4], 0.5), ([30.0, 40.0], 1.05 * 0.5), ([0.1, 0.0], 0.1)):
        param.grad = torch.tensor(grad)
        clip([param])
        assert param.grad.norm().item() == pytest.approx(passed)
    mean = 0.98 * 0.5 + 0.02 * 1.05 * 0.5
    assert clip.norms[id(param)].item() == pytest.approx(0.98 * mean + 0.02 * 0.1)


def test_zclip_lets_usual_norms_pass_and_lowers_an_outlier():
    param = torch.nn.Parameter(torch.zeros(1))
    clip = fault_methods.ZClip(first=4)
    for value in (1.0, 3.0, 1.0, 3.0):  # mean 2, deviation 1
        param.grad = torch.tensor([value])
        clip([param])
        assert param.grad.item() == value
    param.grad = torch.tensor([12.0])  # z = 10
    clip([param])
    assert param.grad.item() == pytest.approx(2 + 2.5**2 / 10, rel=1e-4)
    mean = 0.97 * 2 + 0.03 * 2.625
    assert clip.mean.item() == pytest.approx(mean, rel=1e-4)
    assert clip.variance.item() == pytest.approx(0.97 + 0.03 * (2.625 - mean) ** 2, rel=1e-4)


@pytest.mark.parametrize("optimizer", [*fault_methods.PARTS, *fault_methods.INSTEAD])
def test_each_part_and_each_alternative_trains(corpus, optimizer):
    row = faults.train(faults.Run(optimizer, "tensor x 1e3", 0.2, seed=0, steps=STEPS), corpus)
    assert row["nan_steps"] == 0


def test_the_table_of_the_parts_is_of_the_seeds_that_all_have():
    def row(optimizer, seed, loss, times="1"):
        named = {"optimizer": optimizer, "fault": "none", "rate": "0.0", "steps": "100", "times": times}
        return {**named, "seed": seed, "final_loss": loss, "nan_steps": "0", "survived": "True"}

    rows = [
        row("Stable-SPAM", "0", "5"),
        row("Stable-SPAM", "1", "7"),
        row("ZClip", "0", "6"),
        row("ZClip", "0", "8", "4"),
    ]
    lines = faults.parts_table(rows).splitlines()
    assert "| none | 0.003 | 5.000 | – | – | – | – | 6.000 | – |" in lines
    assert "| none | 0.012 | – | – | – | – | – | 8.000 | – |" in lines
