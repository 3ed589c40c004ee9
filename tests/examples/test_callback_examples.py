"""The examples beside pretraining: each runs to its end with `--smoke`, on its embedded data or on a file."""

import json
import math
import re
from pathlib import Path

import classify
import monitor_adamw
import plain_trainer
import pytest
import rescue

from tests.processes import run_module

EXAMPLES = Path(__file__).parents[2] / "examples"
QUIET = ["--smoke", "--report_to", "none", "--disable_tqdm", "True", "--use_cpu", "True"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "data.txt"
    path.write_text("".join(f"line {i}: {i} times {i + 1} is {i * (i + 1)}, and that is it\n" for i in range(4000)))
    return ["--dataset_name", str(path)]


def logs(folder):
    rows = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [row for row in rows if "loss" in row]


def test_monitoring_adamw(tmp_path, text, capsys):
    monitor_adamw.main(["--output_dir", str(tmp_path), *QUIET, *text])
    assert [row["step"] for row in logs(tmp_path)] == [2, 4]
    assert all(row["gradients/norm_max"] >= row["gradients/norm_mean"] > 0 for row in logs(tmp_path))
    assert not [key for key in logs(tmp_path)[0] if "clipped" in key]
    assert capsys.readouterr().out.rstrip().splitlines()[-1].split()[0] == "4"


RESCUE = ["--report_to", "none", "--disable_tqdm", "True", "--use_cpu", "True", "--block_size", "32"]


def test_rescuing_an_adamw_run(tmp_path, text, capsys):
    """Both halves; then the second half alone, by the options of the lost run."""
    rescue.main(["--output_dir", str(tmp_path / "first"), "--smoke", *RESCUE, *text])
    said = capsys.readouterr().out.splitlines()[-3:]
    assert said[0] == "AdamW: the loss was good until step 4; nan in the end"
    assert said[1].startswith(f"Stable-SPAM from {tmp_path / 'first' / 'adamw' / 'checkpoint-2'}: ")
    assert int(re.search(r"; (\d+) infinite gradients left out$", said[1])[1]) >= 2
    assert said[2].startswith("Validation loss: nan before the rescue, ")
    assert [row["step"] for row in logs(tmp_path / "first")] == list(range(1, 9))
    assert all(math.isfinite(row["loss"]) for row in logs(tmp_path / "first"))

    again = "--max_steps 8 --save_strategy no --logging_steps 1 --warmup_steps 2 --max_eval_samples 8 --four_bit int4"
    lost = ["--lost_run", str(tmp_path / "first" / "adamw"), "--output_dir", str(tmp_path / "second")]
    rescue.main([*lost, *again.split(), *RESCUE, *text])
    assert "; 0 infinite gradients left out\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("losses", "good"),
    [([5.0, 4.0, 4.5], None), ([5.0, 4.0, 5.1, 3.0], 2), ([5.0, math.nan], 1), ([math.nan, 5.0], 0), ([], None)],
)
def test_where_a_run_was_lost(losses, good):
    history = [{"loss": loss, "step": step} for step, loss in enumerate(losses, 1)] + [{"eval_loss": 9.0, "step": 9}]
    assert rescue.last_good_step(history) == good


def test_what_cannot_be_rescued(tmp_path, text):
    with pytest.raises(SystemExit, match=r"--lost_run must be a folder with a run of the Trainer, got .*nowhere"):
        rescue.main(["--output_dir", str(tmp_path), "--lost_run", str(tmp_path / "nowhere")])
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": [{"loss": 4.0, "step": 1}]}))
    with pytest.raises(SystemExit, match=r"the losses in .* never jumped; resume it as it is"):
        rescue.main(["--output_dir", str(tmp_path), "--lost_run", str(tmp_path)])


def test_sequence_classification(tmp_path):
    classify.main(["--output_dir", str(tmp_path), *QUIET])
    assert 0 <= json.loads((tmp_path / "eval_results.json").read_text())["eval_accuracy"] <= 1


def test_supervised_fine_tuning(tmp_path):
    pytest.importorskip("trl", reason="trl is not installed: it is tested by `make test-versions`")
    import finetune_lora

    finetune_lora.main(["--output_dir", str(tmp_path), *QUIET])
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert all(row["gradients/norm"] > 0 for row in logs(tmp_path))


def test_docstrings_become_prompts_and_completions():
    pytest.importorskip("trl", reason="trl is not installed: it is tested by `make test-versions`")
    from finetune_lora import functions_with_docstrings

    source = 'def f(a, b=1):\n    """Add them.\n\n    More."""\n\ndef g():\n    pass\n'
    assert functions_with_docstrings(source) == [{"prompt": "def f(a, b=1):\n", "completion": "Add them."}]


def test_the_plain_script_knows_nothing_of_us(tmp_path):
    source = (EXAMPLES / "plain_trainer.py").read_text()
    assert not [line for line in source.splitlines() if "import" in line and "stablespam" in line]
    plain_trainer.main(["--output_dir", str(tmp_path), *QUIET, "--logging_steps", "1"])
    assert len(logs(tmp_path)) == 5


@pytest.mark.slow
def test_the_plain_script_under_the_launcher(tmp_path):
    script = [EXAMPLES / "plain_trainer.py", "--output_dir", tmp_path, *QUIET, "--logging_steps", "1"]
    script += ["--optim", "stable_spam", "--max_grad_norm", "0"]
    run_module("hf_stablespam", "--four-bit", "int4", "--gradient-norms", *script)
    assert all("gradients/clipped" in row for row in logs(tmp_path))
