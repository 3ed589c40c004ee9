"""Tables that a run's maker left in its folder."""

import json

import pytest

from hf_stablespam.monitor.report.build import write_report
from hf_stablespam.monitor.report.run_tables import run_tables
from hf_stablespam.monitor.report.runs import read_runs
from tests.monitor.report.report_data import write_run

TABLE = {"title": "What <b>came</b>", "columns": ["rows", "share"], "rows": [["A", ["3", "60%"]], ["B", ["2", "40%"]]]}


def write_tables(folder, *tables):
    (folder / "report_tables.json").write_text(json.dumps({"tables": tables}))


def test_a_table_is_shown_escaped_and_once_for_all_runs_that_have_it(tmp_path):
    pytest.importorskip("bokeh", reason="the report needs Bokeh; extra 'report'")
    runs = [write_run(tmp_path / name) for name in ("sft", "dpo", "other")]
    for run in runs[:2]:
        write_tables(run, TABLE)
    html = write_report(runs, tmp_path / "report.html")[0].read_text()
    assert html.count("What &lt;b&gt;came&lt;/b&gt; (sft, dpo)") == 1
    assert "<td>60%</td>" in html
    (alone,) = run_tables(read_runs([runs[0]]))
    assert (alone.title, alone.rows[0]) == (TABLE["title"], ("A", ["3", "60%"]))
    assert run_tables(read_runs([runs[2]])) == []


def test_a_checkpoint_has_the_tables_of_its_run(tmp_path):
    write_run(tmp_path / "run" / "checkpoint-120")
    write_tables(tmp_path / "run", TABLE)
    assert len(run_tables(read_runs([tmp_path / "run"]))) == 1


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"tables": 3}',
        '{"tables": [{"title": "x"}]}',
        json.dumps({"tables": [{**TABLE, "rows": [["A", ["3"]]]}]}),
        json.dumps({"tables": [{**TABLE, "rows": [["A", [3, 4]]]}]}),
    ],
)
def test_a_file_without_tables_is_named(tmp_path, text):
    run = write_run(tmp_path / "run")
    (run / "report_tables.json").write_text(text)
    with pytest.raises(ValueError, match=r"report_tables.json must hold tables in JSON"):
        run_tables(read_runs([run]))
