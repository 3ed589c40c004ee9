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


NO_BIAS = ("Qwen3", "SmolLM3", "Olmo2", "Gemma", "Gemma2", "Gemma3", "Qwen3Moe", "Olmoe")
OTHERS: list[tuple[str, dict[str, Any], str]] = [
    (
        "Phi3",
        {"rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}},
        r"partial_rotary_factor must be 1.0 .* got 0.5",
    ),
    ("Phi3", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor must be 1.0 in llama.cpp's 'phi3', got 0.5"),
    (
        "SmolLM3",
        {"no_rope_layers": [1, 0, 1, 0]},
        r"no_rope_layers must be 0 in every 4th layer .* got \[1, 0, 1, 0\]; exp",
    ),
    ("SmolLM3", {"no_rope_layer_interval": 2}, r"no_rope_layers must be 0 in every 4th layer .* got \[1, 0, 1, 0\]"),
    ("SmolLM3", {"mlp_bias": True}, r"mlp_bias must be False in llama.cpp's 'smollm3', got True"),
    *((name, {"attention_bias": True}, r"attention_bias must be False in llama.cpp's .* got True") for name in NO_BIAS),
    ("GptOss", {"attention_bias": False}, r"attention_bias must be True in llama.cpp's 'gpt-oss', got False"),
    ("GptOss", {"swiglu_alpha": 1.0}, r"swiglu_alpha must be 1.702 in llama.cpp's 'gpt-oss', got 1.0"),
    ("Starcoder2", {"use_bias": False}, r"use_bias must be True in llama.cpp's 'starcoder2', got False"),
    *(
        (name, {"tie_word_embeddings": True}, r"tie_word_embeddings must be False in llama.cpp's .* got True")
        for name in ("Olmo2", "Qwen2Moe", "Olmoe", "GptOss")
    ),
    *(
        (name, {"head_dim": 64}, r"needs 2 heads, got 4; .* leave head_dim at hidden_size / num_attention_heads")
        for name in ("Qwen2", "Phi3", "Olmo2", "Starcoder2", "Qwen2Moe", "Olmoe")
    ),
    *(
        (name, {"use_bidirectional_attention": True}, r"use_bidirectional_attention must be False in .* got True")
        for name in ("Gemma", "Gemma2", "Gemma3")
    ),
    ("Gemma", {"hidden_act": "silu", "hidden_activation": "gelu_pytorch_tanh"}, r"hidden_act must be .* got 'silu'"),
    (
        "Gemma2",
        {"attn_logit_softcapping": None},
        r"attn_logit_softcapping must be a number .* set config.attn_logit_soft",
    ),
    (
        "Gemma2",
        {"final_logit_softcapping": None},
        r"final_logit_softcapping must be a number .* which takes one of its",
    ),
    ("Gemma2", {"head_dim": 64}, r"query_pre_attn_scalar must be the width of a head in .* \(64\), got 32; export"),
    ("Gemma3", {"head_dim": 64}, r"query_pre_attn_scalar must be the width of a head in .* \(64\), got 32"),
    *(
        (
            name,
            {"head_dim": 64, "query_pre_attn_scalar": 64, "num_hidden_layers": layers},
            rf"heads, at {layers} layers",
        )
        for name, layers in (("Gemma2", 46), ("Gemma3", 62))
    ),
    ("Gemma3", {"sliding_window_pattern": 3}, r"layer_types must have 'full_attention' in every 6th layer"),
]


@pytest.mark.parametrize(("name", "options", "message"), OTHERS)
def test_what_llama_cpp_computes_otherwise_or_does_not_load(name, options, message, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        export(f"{name}ForCausalLM", options, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_says_the_same_in_another_way_is_written(tmp_path: Path) -> None:
    export("Phi3ForCausalLM", {"rope_parameters": {**PLAIN, "partial_rotary_factor": 1.0}}, tmp_path)
    (tmp_path / "model.gguf").unlink()
    export("SmolLM3ForCausalLM", {"no_rope_layers": [1, 1, 1, 0], "no_rope_layer_interval": 2}, tmp_path)
    (tmp_path / "model.gguf").unlink()
    export("Gemma2ForCausalLM", {"hidden_act": "silu"}, tmp_path)  # which that class does not read
