"""Configurations that llama.cpp computes otherwise, or does not load, are refused before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gguf", reason="GGUF files need it; install the extra 'gguf'")
from gguf import GGUFReader

from hf_stablespam.quant import FourBitConfig, convert_to_4bit, export_gguf
from tests.quant.export.gguf.models import SCALING, tiny

PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", **SCALING}
LLAMA3 = {"rope_type": "llama3", **SCALING, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def export(name: str, options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The metadata of the file that is written of a tiny model."""
    options = {field: dict(value) if isinstance(value, dict) else value for field, value in options.items()}
    model = convert_to_4bit(tiny(name, **options), FourBitConfig("int4", None, group_size=32))
    export_gguf(model, folder / "model.gguf")
    return {key: field.contents() for key, field in GGUFReader(folder / "model.gguf").fields.items()}


ROPES = [
    ("LlamaForCausalLM", {"rope_type": "dynamic", **SCALING}, r"rope_type must be 'default', .* got 'dynamic'; conv"),
    (
        "LlamaForCausalLM",
        {**YARN, "beta_fast": 4.0},
        r"beta_fast, .* must be 32, 1 and True .* got 4.0, 1 and True; exp",
    ),
    ("LlamaForCausalLM", {**YARN, "beta_slow": 3.0}, r"beta_fast, beta_slow .* got 32, 3.0 and True"),
    ("LlamaForCausalLM", {**YARN, "truncate": False}, r"beta_fast, beta_slow and truncate .* got 32, 1 and False"),
    (
        "GptOssForCausalLM",
        {**YARN, "beta_fast": 4.0},
        r"beta_fast, .* in llama.cpp's 'gpt-oss', .* got 4.0, 1 and True",
    ),
    ("Qwen3ForCausalLM", LLAMA3, r"rope_type must not be 'llama3' for llama.cpp's 'qwen3', which reads no factors"),
    (
        "Gemma3ForCausalLM",
        {"full_attention": PLAIN, "sliding_attention": {"rope_type": "linear", **SCALING}},
        r"rope_type of 'sliding_attention' must be 'default' in llama.cpp's 'gemma3', got 'linear'; export it for ano",
    ),
    (
        "Gemma3ForCausalLM",
        {"full_attention": {**YARN, "attention_factor": 0.5}, "sliding_attention": PLAIN},
        r"attention_factor, mscale and mscale_all_dim .* which multiplies layers with a window .* got 0.439\d+ times",
    ),
]


@pytest.mark.parametrize(("name", "rope", "message"), ROPES)
def test_rotary_embeddings_that_llama_cpp_does_not_compute(name, rope, message, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        export(name, {"rope_parameters": rope}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_told_of_yarn(tmp_path: Path) -> None:
    """Turns that give the same bounds, once they are rounded, are the same frequencies."""
    fields = export(
        "LlamaForCausalLM", {"rope_parameters": {**YARN, "beta_fast": 31.9, "attention_factor": 0.5}}, tmp_path
    )
    assert fields["llama.rope.scaling.type"] == "yarn"
    assert fields["llama.rope.scaling.factor"] == 4.0
    assert fields["llama.rope.scaling.original_context_length"] == 64
    assert fields["llama.rope.scaling.attn_factor"] == pytest.approx(0.5 / (0.1 * 1.3862944 + 1.0))


def test_gpt_oss_does_not_round_the_bounds_of_yarn_and_llama_cpp_does(tmp_path: Path) -> None:
    fields = export("GptOssForCausalLM", {"rope_parameters": {**YARN, "truncate": False}}, tmp_path)
    assert fields["gpt-oss.rope.scaling.attn_factor"] == 1.0
