"""The queue of quality runs: what it asks for, what it does not repeat, and the tables it makes of the record."""

import math
from dataclasses import replace

import pytest

from benchmarks import _queue, _record, quality, quality_plots, quality_runs, quality_tables
from benchmarks.quality_methods import METHODS, PRECISIONS, WITHOUT_RESETS
from benchmarks.quality_runs import Run
from benchmarks.quality_studies import ON_CPU, STUDIES, best_rate

BASE = Run("stable_spam", "int4", 3e-3)
TINY = ["--steps", "2", "--batch_size", "2", "--block_size", "16"]


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Pretend pretrainings: the loss is the distance of the learning rate from 3e-3, and a bit for the seed."""
    runs = []

    def train(run):
        runs.append(run)
        diverged = run.learning_rate >= 1e-2 and run.method == "adamw"
        loss = math.nan if diverged else 3 + 100 * abs(run.learning_rate - 3e-3) + (run.seed - 42) / 100
        return {**vars(run), "eval_loss": loss, "curve": f"{run.steps}:{loss}"}

    monkeypatch.setattr(Run, "train", train)
    monkeypatch.setattr(_record, "RESULTS", tmp_path)
    return runs


def test_the_seeds_follow_at_the_best_learning_rate(made):
    quality.main(["--studies", "relatives"])
    own = [(run.learning_rate, run.seed) for run in made if run.method == "adamw"]
    assert own == [(1e-3, 42), (3e-3, 42), (1e-2, 42), (3e-3, 43), (3e-3, 44)]


def test_no_best_rate_before_all_rates_ran():
    rates = METHODS["adamw"].rates
    record = {replace(BASE, method="adamw", learning_rate=rate): {"eval_loss": rate} for rate in rates[:-1]}
    assert best_rate(record, replace(BASE, method="adamw")) is None


def test_what_is_on_record_is_not_run_again(made):
    quality.main(["--studies", "pairs", "--at_most", "4"])
    assert len(made) == 4
    quality.main(["--studies", "pairs"])
    assert len(made) == 9
    assert len(set(made)) == 9
    quality.main(["--studies", "pairs"])
    assert len(made) == 9
    quality.main(["--studies", "pairs", "--steps", "7"])
    assert [run.steps for run in made[9:]] == [7] * 9


def test_what_another_process_trains_is_left_to_it_and_waited_for(made, monkeypatch):
    (first, *rest) = pairs = list(dict.fromkeys(STUDIES["pairs"](BASE, {})))
    theirs = _queue.claim(first)

    def they_finish(seconds):
        assert made == rest
        quality.train(first)
        theirs.release()

    monkeypatch.setattr(_queue.time, "sleep", they_finish)
    quality.main(["--studies", "pairs"])
    assert sorted(made, key=repr) == sorted(pairs, key=repr)


def test_a_run_that_was_finished_meanwhile_is_not_repeated(made, monkeypatch):
    claim = _queue.claim

    def finished_by_another(run):
        if not made:
            quality.train(run)
        return claim(run)

    monkeypatch.setattr(_queue, "claim", finished_by_another)
    quality.main(["--studies", "pairs"])
    assert len(made) == len(set(made)) == 9


def test_a_claim_ends_with_its_holder(made):
    run = next(STUDIES["pairs"](BASE, {}))
    lock = _queue.claim(run)
    assert _queue.claim(run) is None
    lock.release()
    assert _queue.claim(run) is not None


def test_the_table_alone_runs_nothing(made, capsys):
    quality.main(["--studies", "pairs", "--table"])
    assert made == []
    assert "| optimizer | precision | lr |" in capsys.readouterr().out


def test_a_row_of_the_table(made, capsys):
    quality.main(["--studies", "pairs"])
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| `stable_spam` | int4"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2:] == ["0.003", "3", "3.010", "0.010", "3.000", "3.020", "20.3"]


def test_a_divergence_is_a_row_as_well(made):
    quality.main(["--studies", "sweep"])
    table = quality_tables.table("sweep", BASE, quality.read_record())
    assert "| `adamw` | int4 | 0.02 | 1 | diverged | – | diverged | diverged | diverged |" in table


def test_the_list_names_every_study(made, capsys):
    quality.main(["--list"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(ON_CPU)


def test_every_study_asks_for_known_methods_and_precisions(made):
    """Also the runs that depend on others: all of them are made here, as pretences."""
    quality.main([])
    assert {run.method for run in made} <= set(METHODS)
    assert {run.precision for run in made} == set(PRECISIONS)
    assert {run.method for run in made} >= {"galore", "official_reset100", "only_decay", "adamw_clipped_beta95"}
    assert 120 < len(made) < 280


def test_a_method_without_its_options_would_not_be_that_method():
    assert "clip_beta=none,norm_betas=none" in METHODS["galore"].optim_args
    assert "rank=32" in METHODS["galore_stable_spam"].optim_args
    assert [name for name, method in METHODS.items() if method.stabilized] == [
        *("adamw_stabilized", "lion_stabilized", "shorter_muon_stabilized")
    ]


@pytest.mark.parametrize(
    ("method", "precision"),
    [
        ("stable_spam", "int4"),
        ("adamw_clipped", "full"),
        ("lion_stabilized", "nvfp4"),
        ("official_reset100", "mxfp4"),
        ("shorter_muon_stabilized", "int4"),
        ("shorter_wsd", "int4"),
        ("stable_spam_embedding10", "int4"),
    ],
)
def test_a_real_run_gives_a_row_that_reads_back(method, precision, tmp_path, monkeypatch):
    monkeypatch.setattr(_record, "RESULTS", tmp_path)
    monkeypatch.setattr(quality_runs, "CURVE_BLOCKS", 2)
    monkeypatch.setattr(quality_runs, "FINAL_BLOCKS", 4)
    size = "tiny-tied" if method == "stable_spam_embedding10" else "tiny"
    run = Run(method, precision, 1e-3, steps=2, batch_size=2, block_size=16, model_size=size)
    _record.append_rows(quality.NAME, [run.train()])
    ((read, row),) = quality.read_record().items()
    assert read == run
    assert 7 < float(row["eval_loss"]) < 8.5
    assert [int(point.split(":")[0]) for point in row["curve"].split()] == [1, 2]


def test_the_second_text_is_another(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_STABLESPAM_CACHE", str(tmp_path))
    corpus = quality_runs.torch_headers(300, ("c10",))
    assert "#include" in corpus.tokenizer.decode(corpus.train[:3000].tolist())
    assert len(corpus.validation) > 1_000


def test_the_first_step_below_a_loss_is_interpolated():
    points = [(10, 5.0), (20, 4.0), (30, 3.0)]
    assert quality_tables.steps_to(4.5, points) == 15
    assert quality_tables.steps_to(6.0, points) == 10
    assert math.isinf(quality_tables.steps_to(2.0, points))


def test_the_share_of_steps_to_each_adamw(made):
    quality.main(["--studies", "steps"])
    lines = quality_tables.steps_table(BASE, quality.read_record()).splitlines()[2:]
    assert lines[0] == "| `adamw_clipped` | 0.003 | 1.00 | 1.00, 1.00, 1.00 |"
    assert len(lines) == 4


def test_fewer_steps_stand_beside_the_goals(made):
    quality.main(["--studies", "pairs", "honest_baselines", "fewer_steps"])
    summary = quality_tables.apart_summary(BASE, quality.read_record())
    assert summary.count("3.010 ± 0.010 (lr 0.003, 3 seeds)") == 2
    lines = quality_tables.fewer_table(BASE, quality.read_record()).splitlines()[2:]
    assert lines[0] == "| `adamw_clipped` | 0.003 | 500 (1) | 3 | 3.010 | 0.010 |"
    assert lines[1].startswith("| `adamw_clipped_embedding10` | 0.003 | 500 (1) | 3 |")
    assert {line.split("|")[3].strip() for line in lines[2:]} == {"200 (0.4)", "375 (0.75)"}


def test_longer_runs_go_on_at_the_best_adamw(made):
    quality.main(["--studies", "longer"])
    assert {(run.model_size, run.steps, run.batch_size) for run in made} == {("9m", 2000, 8)}
    assert [run.learning_rate for run in made[:6]] == [3e-3, 1.5e-3] * 3
    later = [(run.seed, run.precision) for run in made[6:12]]
    assert later == [(42, "full")] * 2 + [(43, "int4")] * 2 + [(43, "full")] * 2
    assert {run.method for run in made[6:12]} == {"stable_spam_embedding10", "adamw_clipped_embedding10"}
    assert [(run.method, run.seed) for run in made[12:]] == [(WITHOUT_RESETS, 42), (WITHOUT_RESETS, 43)]
    summary = quality_tables.longer_summary(BASE, quality.read_record())
    assert "3.005 ± 0.007 (lr 0.003, 2 seeds) with Stable-SPAM without its resets, " in summary


def test_minutes_become_steps(made, monkeypatch, tmp_path):
    monkeypatch.setattr(Run, "train", lambda run: made.append(run) or {"seconds_per_step": 0.5, "eval_loss": 1.0})
    assert quality.steps_within(2, BASE) == 240


def test_the_figures_are_drawn_from_the_record(made, tmp_path):
    quality.main(["--studies", "pairs", "sweep", "honest_baselines", "longer"])
    quality_plots.main(["--output", str(tmp_path / "images")])
    sizes = [path.stat().st_size for path in (tmp_path / "images").glob("*.png")]
    assert len(sizes) == 4
    assert min(sizes) > 10_000
