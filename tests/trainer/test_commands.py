"""The subcommands beside the launcher: `report` and `export`."""

import json
import re
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_stablespam
from hf_stablespam import FourBitConfig, convert_to_4bit
from hf_stablespam.__main__ import main
from tests.trainer.helpers import tiny_llama, tiny_trainer


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["hf-stablespam", *map(str, arguments)])
    return main()


def test_report_compares_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("bokeh", reason="the report needs bokeh, which is not installed: it is in the extra report")
    trainer = tiny_trainer(tmp_path / "run", max_steps=2)
    trainer.train()
    trainer.save_state()
    assert command(monkeypatch, "report", tmp_path / "run", "-o", tmp_path / "report.html") == 0
    assert "<html" in (tmp_path / "report.html").read_text()
    assert capsys.readouterr().out.endswith(f"{tmp_path / 'report.html'}\n")


@pytest.mark.parametrize("spelling", ["--group-size", "--group_size"])
def test_export_writes_what_training_computed_with(tmp_path, monkeypatch, spelling):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed: it is in the extra export")
    model = tiny_llama(hidden_size=32, intermediate_size=64).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "trained")
    flags = ("--weight", "int4", spelling, "32")
    assert command(monkeypatch, "export", tmp_path / "trained", tmp_path / "packed", *flags) == 0

    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype="auto")
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "trained", dtype="auto")
    convert_to_4bit(trained, FourBitConfig(weight="int4", activation=None, group_size=32))
    tokens = torch.arange(16).view(2, 8)
    with torch.no_grad():
        torch.testing.assert_close(packed(tokens).logits, trained(tokens).logits, rtol=0, atol=0)
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"


@pytest.fixture
def run(tmp_path):
    """A run whose output folder has a checkpoint and no model of its own."""
    model = convert_to_4bit(tiny_llama(hidden_size=32, intermediate_size=64), FourBitConfig(group_size=32))
    model.save_pretrained(tmp_path / "run" / "checkpoint-2")
    (tmp_path / "run" / "checkpoint-2" / "trainer_state.json").write_text('{"global_step": 2, "log_history": []}')
    return tmp_path / "run"


@pytest.mark.parametrize("target", ["compressed-tensors", "unpacked"])
@pytest.mark.parametrize("output", ["checkpoint-2", "../run/checkpoint-2/"])
def test_export_of_a_run_leaves_the_checkpoint_that_it_reads(run, monkeypatch, capsys, target, output):
    """Its weights in high precision would be gone: `checkpoint-2` is what `run` stands for."""
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert command(monkeypatch, "export", run, f"{run}/{output}", "--to", target) == 1
    error = capsys.readouterr().err
    assert re.search(r"output must be another folder than the checkpoint, got .*, the last one of .*run, whose", error)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_no_file_of_the_checkpoint_is_replaced_by_a_gguf_file(run, monkeypatch, capsys):
    weights = run / "checkpoint-2" / "model.safetensors"
    before = weights.read_bytes()
    arguments = ("export", run, weights, "--to", "gguf", "--overwrite"), ("repack", "no.gguf", weights, "--like", run)
    for given in arguments:
        assert command(monkeypatch, *given) == 1
        assert "output must be no file of the checkpoint" in capsys.readouterr().err
    assert weights.read_bytes() == before


def test_help_of_a_command_comes_without_torch():
    """It takes seconds to import; and options are shown with hyphens only, though underscores are taken too."""
    code = (
        "import runpy, sys\n"
        "sys.argv = ['hf-stablespam', 'export', '--help']\n"
        "try: runpy.run_module('hf_stablespam', run_name='__main__')\n"
        "except SystemExit: print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.endswith("False False\n")
    assert "--group-size" in shown
    assert "--group_size" not in shown


def test_no_arguments_at_all_show_the_help_and_version_says_which(monkeypatch, capsys):
    assert command(monkeypatch) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: ")
    assert "examples:" in shown
    with pytest.raises(SystemExit) as end:
        command(monkeypatch, "--version")
    assert end.value.code == 0
    assert capsys.readouterr().out == f"hf_stablespam {hf_stablespam.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "nowhere", "out"], r"nowhere has no config.json; give a folder .* \(nowhere does not exist\)"),
        (["export", ".", "out"], r"\. has no config.json; give a folder that the Trainer"),
        (["export", "nowhere", "nowhere"], "output must be another folder than the checkpoint, got 'nowhere'"),
        (["report", "nowhere"], "nowhere"),
    ],
)
def test_wrong_uses_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, *arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert re.search(message, error)
