"""The pages of the evidence show what the committed results show."""

import csv
import json

import pytest

from benchmarks import (
    cost_on_paper,
    demo_record,
    evidence_page,
    evidence_smoke,
    outside_language,
    qat_record,
    quality,
    step_tables,
)


def test_every_table_of_the_pages_is_that_of_the_results():
    assert evidence_page.pages()
    evidence_page.main(["--check"])


def test_a_changed_number_is_noticed(tmp_path, monkeypatch):
    page = tmp_path / "evidence.md"
    page.write_text("Before\n\n<!-- table: cost -->\n\n| 1 | 2 |\n\n<!-- end -->\n\nAfter\n")
    monkeypatch.setattr(evidence_page, "DOCS", tmp_path)
    with pytest.raises(SystemExit, match=r"not what the results show: evidence\.md; run evidence_page\.py"):
        evidence_page.main(["--check"])
    evidence_page.main([])
    text = page.read_text()
    assert text.startswith("Before\n\n<!-- table: cost -->\n\n| model |")
    assert text.endswith("<!-- end -->\n\nAfter\n")
    evidence_page.main(["--check"])


def test_an_unknown_table_is_named():
    with pytest.raises(ValueError, match=r"table: must be one of pairs, .*, got 'none'"):
        evidence_page.filled("<!-- table: none -->\n<!-- end -->")


def test_the_cost_of_a_billion_parameters():
    (row,) = [line for line in cost_on_paper.cost_table().splitlines() if "1B" in line and "`StableSPAM` " in line]
    assert row.split("|")[3].strip() == "5.4"  # two bfloat16 moments of 1.34 billion parameters
    assert cost_on_paper.gpu_hours(1e9, 1e9) == pytest.approx(6e18 / (989e12 * 0.4) / 3600)


def test_what_the_smoke_run_repeats_is_on_record():
    assert set(evidence_smoke.pretrainings()) <= set(quality.read_record())
    assert evidence_smoke.fine_tuning() in qat_record.read_record()
    assert set(evidence_smoke.digits()) <= set(outside_language.read_record())


def test_a_difference_is_printed(capsys):
    assert evidence_smoke.compare("run", 1.0, 1.01, 0.02)
    assert not evidence_smoke.compare("run", 1.0, 1.1, 0.02)
    assert capsys.readouterr().out.splitlines()[1].endswith("DIFFERS")


def test_the_demo_goes_on_record_from_its_folder(tmp_path):
    for run, losses in zip(demo_record.demo.RUNS, ((5.0, 4.2), (5.0, 4.4), (4.3, 4.1)), strict=True):
        (tmp_path / run.folder).mkdir()
        history = [{"step": 10 * n, "eval_loss": loss} for n, loss in enumerate(losses, 1)]
        history.append({"step": 20, "train_runtime": 7.25})
        (tmp_path / run.folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    rows = demo_record.rows_of(tmp_path)
    assert [(row["loss"], row["target"], row["steps_to_target"]) for row in rows] == [
        (4.2, 4.4, 20),
        (4.4, 4.4, 20),
        (4.1, 4.4, 10),
    ]
    assert rows[0]["optimizer"] == "AdamW + clipping"
    assert rows[0]["seconds"] == 7.2


def test_the_tables_of_steps_read_their_file_once(monkeypatch):
    reader, read = csv.DictReader, []
    monkeypatch.setattr(csv, "DictReader", lambda file: read.append(file) or reader(file))
    step_tables._rows.cache_clear()
    assert step_tables.table().startswith("On ")
    assert step_tables.summary().startswith("* On ")
    assert len(read) == 1
