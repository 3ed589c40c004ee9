"""The study of a real model: its order, its search for the learning rate, and a run of it with a tiny model."""

import math
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import _record, qat_smollm2, qat_tables
from benchmarks.qat_record import FORMATS, FULL, GGUF, LOADED, LONGER, RATES, SEEDS, STEPS, Run
from benchmarks.qat_smollm2 import METHODS, search, study


def pretended(best: float):
    """A record that is filled as it is asked for; the perplexity grows with the distance of the rate from `best`."""
    record: dict[Run, dict[str, str]] = {}
    while True:
        waiting = [run for run in study(record) if run not in record]
        if not waiting:
            return record
        run = waiting[0]
        distance = abs(math.log2(run.learning_rate / best)) if run.learning_rate else 9
        record[run] = {"perplexity": str(20 + distance)}


@pytest.mark.parametrize("best", [2e-4, 5e-5, 8e-4])
def test_the_best_rate_has_a_worse_one_on_both_sides_before_the_seeds_follow(best):
    record = pretended(best)
    for steps in (STEPS, round(LONGER * STEPS)):
        own = [run for run in record if (run.method, run.precision, run.steps) == ("stable_spam", GGUF, steps)]
        tried = sorted(run.learning_rate for run in own if run.seed == SEEDS[0])
        assert tried[0] < best < tried[-1]
        assert [run.learning_rate for run in own if run.seed != SEEDS[0]] == pytest.approx([best, best])
    assert {(run.method, run.precision, run.seed) for run in record} >= {
        (method, precision, seed) for method in METHODS for precision in FORMATS for seed in SEEDS
    }


def test_no_best_rate_while_one_is_missing():
    base = Run("stable_spam", GGUF, 0.0)
    record = {replace(base, learning_rate=rate): {"perplexity": "20"} for rate in RATES[:-1]}
    assert search(base, record)[1] is None


def test_runs_of_a_tiny_model_are_rows_that_read_back(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    )
    ids = torch.randint(64, (8, 16))
    blocks = [{"input_ids": row, "labels": row} for row in ids]
    windows = [row.tolist() for row in ids[:4]]
    monkeypatch.setattr(qat_smollm2, "materials", lambda: (model, None, blocks, windows, blocks[:4]))
    monkeypatch.setattr(qat_smollm2, "export_gguf", lambda *args, **kwargs: None)
    monkeypatch.setattr(_record, "RESULTS", tmp_path)
    monkeypatch.setattr(qat_smollm2, "FILES", tmp_path)
    before = {name: param.clone() for name, param in model.named_parameters()}
    runs = [Run(LOADED, FULL, 0.0, steps=0), *(Run(method, GGUF, 1e-2, steps=4) for method in METHODS)]
    for run in runs:
        qat_smollm2.make(run)
    record = qat_smollm2.read_record()
    assert list(record) == runs
    assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())
    loaded, *trained = record.values()
    assert float(loaded["perplexity"]) != float(loaded[f"rounded_{GGUF}"])
    for row in trained:
        assert [point.split(":")[0] for point in row["curve"].split()] == ["1", "2", "3", "4"]
        assert float(row["perplexity"]) < float(loaded["perplexity"])


def row(perplexity, **more):
    return {"perplexity": str(perplexity), "curve": "", **{key: str(value) for key, value in more.items()}}


@pytest.fixture
def record():
    """Two methods in the first format, one of them with three seeds, and full precision."""
    after = {f"rounded_{name}": value for name, value in zip(FORMATS, (50, 60, 70, 80), strict=True)}
    found = {
        Run(LOADED, FULL, 0.0, steps=0): row(40, tokens=99, **after),
        Run("adamw_clipped", FULL, 2e-4): row(30, **after),
    }
    for rate, perplexity in ((1e-4, 35), (2e-4, 33), (4e-4, 34)):
        found[Run("stable_spam", GGUF, rate)] = row(perplexity)
    found |= {Run("stable_spam", GGUF, 2e-4, seed): row(33 + seed) for seed in SEEDS[1:]}
    found[Run("adamw_clipped", GGUF, 1e-4)] = row(36)
    return found


def test_the_tables_take_the_best_rate_and_all_its_seeds(record):
    lines = qat_tables.table(record).splitlines()
    cells = "50.00 (0.0002, 1 seed) | 36.00 (0.0001, 1 seed) | 34.00 ± 1.00 (0.0002, 3 seeds)"
    assert f"| int4_signed, groups of 32 | 50.00 | {cells} |" in lines
    assert "| full precision | 40.00 | – | 30.00 (0.0002, 1 seed) | – |" in lines
    rates = qat_tables.rates_table(record).splitlines()
    assert "| 40 | Stable-SPAM | int4_signed, groups of 32 | 35.00 | 33.00 | 34.00 |" in rates


def test_what_is_rounded_afterwards_is_the_rate_that_is_best_after_it(record):
    record[Run("adamw_clipped", FULL, 4e-4)] = row(31, **{f"rounded_{name}": 49 for name in FORMATS})
    lines = qat_tables.table(record).splitlines()
    assert "| full precision | 40.00 | – | 30.00 (0.0002, 1 seed) | – |" in lines
    assert any(line.startswith("| int4_signed, groups of 32 | 50.00 | 49.00 (0.0004, 1 seed) |") for line in lines)


def test_each_way_has_its_own_best_rate_after_each_number_of_steps(record):
    record[Run("adamw_clipped", FULL, 2e-4, steps=100)] = row(28, **{f"rounded_{GGUF}": 32})
    for rate, perplexity in ((1e-4, 29), (2e-4, 30)):
        record[Run("stable_spam", GGUF, rate, steps=100)] = row(perplexity)
    said = qat_tables.summary(record).splitlines()
    assert said[0].startswith("Perplexity of 99 tokens")
    assert said[0].endswith("The loaded model has 40.00, and 50.00 once its matrices are rounded to 4 bits.")
    assert said[4:8] == [
        "| fine-tuned in full precision | 30.00 (0.0002, 1 seed) | 28.00 (0.0002, 1 seed) |",
        "| the same, then rounded to 4 bits | 50.00 (0.0002, 1 seed) | 32.00 (0.0002, 1 seed) |",
        "| trained in 4 bits, AdamW + clipping | 36.00 (0.0001, 1 seed) | – |",
        "| trained in 4 bits, Stable-SPAM | 34.00 ± 1.00 (0.0002, 3 seeds) | 29.00 (0.0001, 1 seed) |",
    ]
    assert said[-1].endswith("takes away 70 % (AdamW + clipping) and 80 % (Stable-SPAM) after 40 steps.")
    record[Run("adamw_clipped", GGUF, 1e-4, steps=100)] = row(30)
    assert said[-1][:-1] + ", 50 % (AdamW + clipping) and 75 % (Stable-SPAM) after 100 steps." in qat_tables.summary(
        record
    )


def test_the_figure_has_a_line_for_each_run_and_bars_for_what_is_on_record(record, tmp_path):
    for run, line in record.items():
        if run.method != LOADED:
            line["curve"] = f"20:3.6 40:{math.log(float(line['perplexity']))}"
    left, right = qat_tables.figure(record).axes
    assert len(left.lines) == 1 + 3 + 2  # AdamW once, Stable-SPAM's seeds, the two levels
    assert left.lines[0].get_ydata()[0] == 50  # before the first step: rounded as loaded
    for method in METHODS:  # then the longer runs are drawn, against the levels of theirs
        record[Run(method, GGUF, 1e-4, steps=100)] = row(30, curve="100:3.4")
    assert len(qat_tables.figure(record).axes[0].lines) == 2
    heights = [bar.get_height() for bar in right.patches]
    assert heights[:4] == [10, 20, 30, 40]
    assert heights[4:8] == [20, 30, 40, 50]


def test_the_files_are_those_of_llama_cpp(tmp_path, monkeypatch):
    monkeypatch.setattr(_record, "RESULTS", tmp_path)
    qat_smollm2.add_file_row({"method": "stable_spam", "learning_rate": 2e-4, "steps": 40}, 31.0, 31.031, 91.7)
    assert "| Stable-SPAM, 0.0002, 40 steps | – | 31.0 | 31.031 | +0.10 % | 91.7 |" in qat_tables.files_table()
