"""The two 4-bit examples run from start to end."""

from __future__ import annotations

import pytest

from tests.examples.test_callback_examples import QUIET, text  # noqa: F401

pytest.importorskip("compressed_tensors", reason="export needs it; install the extra 'export'")


def test_a_lora_adapter_on_a_4bit_base_is_trained_merged_and_packed(tmp_path, text, capsys):  # noqa: F811
    import finetune_lora_4bit

    finetune_lora_4bit.main(["--output_dir", str(tmp_path), *QUIET, *text, "--merge", "True"])
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert (tmp_path / "merged-4bit" / "model.safetensors").exists()
    assert "trainable params" in capsys.readouterr().out


@pytest.mark.parametrize("four_bit", ["int4", "nvfp4"])
def test_a_trained_model_is_packed_loaded_and_writes(tmp_path, text, capsys, four_bit):  # noqa: F811
    import export_and_generate

    options = ["--four_bit", four_bit, "--prompt", "line 7"]
    export_and_generate.main(["--output_dir", str(tmp_path), *QUIET, *text, *options])
    out = capsys.readouterr().out
    assert "packed: " in out
    assert out.rstrip().splitlines()[-1].startswith("line 7")
