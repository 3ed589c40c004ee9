import json

import demo
import pytest


def history(*losses, every=10):
    rows = [{"step": every * (i + 1), "eval_loss": loss, "eval_perplexity": 2.0**loss} for i, loss in enumerate(losses)]
    return [*rows, {"step": every * len(losses), "train_runtime": 12.3}]


def test_steps_to_reach_is_the_first_evaluation_at_or_below():
    assert demo.steps_to_reach(history(5.0, 4.0, 3.0, 3.5, 2.0), 3.2) == 30
    assert demo.steps_to_reach(history(5.0, 4.0), 4.0) == 20
    assert demo.steps_to_reach(history(5.0, 4.0), 3.9) is None


def test_a_step_that_was_evaluated_twice_counts_once():
    assert demo.series([*history(5.0, 4.0), {"step": 20, "eval_loss": 4.0}], "eval_loss") == ([10, 20], [5.0, 4.0])


@pytest.mark.parametrize(
    ("candidate", "words"),
    [
        ((5.0, 3.5, 3.0), ["3.000, 0.400 below AdamW's 3.400", "reached after 30 of 30 steps"]),
        ((5.0, 3.3, 3.5), ["3.500, 0.100 above AdamW's 3.400", "reached after 20 of 30 steps"]),
        ((5.0, 4.5, 4.0), ["4.000, 0.600 above AdamW's 3.400", "did not reach AdamW's final loss within 30 steps"]),
    ],
    ids=["better", "worse at the end", "worse"],
)
def test_the_verdict_comes_from_the_numbers(candidate, words):
    histories = {
        "adamw": history(5.0, 4.0, 3.0),
        "adamw_int4": history(5.0, 4.0, 3.4),
        "stable_spam_int4": history(*candidate),
    }
    text = demo.summary(histories, 30)
    assert all(word in text for word in words)
    table = demo.table(histories)
    assert len(table.splitlines()) == 5
    assert f"{candidate[-1]:.3f}" in table
    assert "steps to 3.400" in table


def test_the_demo_runs_from_one_end_to_the_other(tmp_path, capsys):
    demo.main(["--steps", "2", "--output_dir", str(tmp_path)])
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    for run in demo.RUNS:
        assert (tmp_path / run.folder / "model.safetensors").is_file()
        assert json.loads((tmp_path / run.folder / "all_results.json").read_text())["eval_loss"] > 0
    assert "stable_spam_int4" in (tmp_path / "report.html").read_text()
    shown = capsys.readouterr().out
    assert shown.count("$ python examples/pretrain.py") == 3
    assert "--optim stable_spam --max_grad_norm 0 --four_bit int4" in shown


def test_too_few_steps(capsys):
    with pytest.raises(SystemExit):
        demo.main(["--steps", "1"])
    assert "--steps must be at least 2, got 1" in capsys.readouterr().err
