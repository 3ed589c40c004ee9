from pathlib import Path

from hf_stablespam.monitor.report import tables as report_tables
from hf_stablespam.monitor.report.runs import Run

from .report_data import log_rows


def run(rows=None, label="run", **settings):
    return Run(label, Path("x"), log_rows(120) if rows is None else rows, settings=settings)


def test_steps_to_reach_compares_each_run_with_each():
    fast = run([{"step": s, "eval_loss": 5.0 - s} for s in (1, 2, 3)], "fast")
    slow = run([{"step": s, "eval_loss": 5.0 - s / 2} for s in (1, 2, 3)], "slow")
    table = report_tables.reach_table([fast, slow])
    assert table.columns == ["fast: 2", "slow: 3.5"]
    assert table.rows == [("fast", ["3", "2"]), ("slow", ["not reached", "3"])]


def test_without_evaluations_the_training_loss_is_compared():
    runs = [
        run([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}], "a"),
        run([{"step": 1, "train_runtime": 3.0}], "b"),
    ]
    assert report_tables.reach_table(runs).rows[0] == ("a", ["2", "–"])


def test_a_single_run_has_nothing_to_reach():
    assert report_tables.reach_table([run()]) is None


def test_settings_that_differ_are_marked_and_folders_are_left_out():
    one = run(learning_rate="1", seed="1", output_dir="a", adam_beta1="0.9", bf16="True")
    two = run(learning_rate="2", seed="1", output_dir="b", adam_beta1="0.9")
    table = report_tables.settings_table([one, two])
    assert dict(table.rows) == {"learning_rate": ["1", "2"], "seed": ["1", "1"], "bf16": ["True", "–"]}
    assert table.marked == {"learning_rate", "bf16"}


def test_the_summary_shows_only_what_some_run_has():
    table = report_tables.summary_table([run(), run([{"step": 7, "loss": 2.0}], "b")])
    rows = dict(table.rows)
    assert rows["last step"] == ["120", "7"]
    assert rows["training loss"][1] == "2"
    assert rows["validation loss"][1] == "–"
    assert "spikes recorded" not in rows
