"""Real llama.cpp (through xllamacpp) computes what transformers computes, and cuts texts into the same tokens."""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
from tokenizers import pre_tokenizers

pytest.importorskip("gguf", reason="GGUF files need it; install the extra 'gguf'")
pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: it is in the extra gguf-test")

from hf_stablespam.quant import FourBitConfig, convert_to_4bit, export_gguf
from hf_stablespam.quant.export.gguf import tensors
from hf_stablespam.quant.export.gguf.architectures import ARCHITECTURES
from hf_stablespam.quant.export.gguf.tokenizer import PRE_TOKENIZERS
from tests.quant.export.gguf.models import (
    MIXTURES,
    SCALING,
    TEXT,
    VOCABULARY,
    byte_level_tokenizer,
    sentencepiece_tokenizer,
    splitting,
    tiny,
)
from tests.quant.export.gguf.test_export_gguf import types

sys.path.insert(0, str(Path(__file__).parents[4] / "examples"))
from llama_cpp import LlamaCpp

TOKENIZER = byte_level_tokenizer()
IDS = torch.randint(1, 300, (40,), generator=torch.Generator().manual_seed(0)).tolist()
LENGTHS = (3, 24, 40)


def divergence(model: torch.nn.Module, file: Path) -> float:
    """Largest KL of llama.cpp's next token from transformers', of a few beginnings of `IDS`.

    Of mixtures the middle one: where two experts are nearly as good, 8-bit activations may choose the other.
    """
    engine = LlamaCpp(file, context=64)
    found = torch.tensor([engine.log_probabilities(IDS[:length], VOCABULARY) for length in LENGTHS])
    with torch.no_grad():
        logits = model(torch.tensor([IDS])).logits[0, [length - 1 for length in LENGTHS]]
    expected = logits.float().log_softmax(-1)
    apart = (expected.exp() * (expected - found)).sum(-1)
    return float(apart.median() if type(model).__name__ in MIXTURES else apart.amax())


CASES = [
    *((name, "int4") for name in ARCHITECTURES),
    *((name, "nvfp4") for name, architecture in ARCHITECTURES.items() if architecture.tensor_scales),
    ("LlamaForCausalLM", "mxfp4"),
    ("GptOssForCausalLM", "mxfp4"),
]


@pytest.mark.parametrize(("name", "format"), CASES, ids=str)
def test_llama_cpp_computes_what_transformers_computes(name: str, format: str, tmp_path: Path) -> None:
    model = convert_to_4bit(tiny(name), FourBitConfig(format, None, group_size=32))
    export_gguf(model, tmp_path / "model.gguf", TOKENIZER, embedding="f32")
    # llama.cpp rounds activations to 8 bits: 1e-3. Rows in the wrong order, or a norm without its one: 0.1 and more.
    assert divergence(model, tmp_path / "model.gguf") < 0.02


def test_a_wrong_order_of_rows_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_stablespam.quant.export.gguf.tensors.interleave", lambda rows, heads: rows)
    model = convert_to_4bit(tiny(), FourBitConfig("int4", None, group_size=32))
    export_gguf(model, tmp_path / "model.gguf", TOKENIZER, embedding="f32")
    assert divergence(model, tmp_path / "model.gguf") > 0.1


def test_gate_and_up_of_an_expert_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exchanged(weight, block):
        rows = parts(weight, block)
        return {"GATE": rows["UP"], "UP": rows["GATE"]} if "GATE" in rows else rows

    parts = tensors._parts
    monkeypatch.setattr(tensors, "_parts", exchanged)
    model = convert_to_4bit(tiny("GptOssForCausalLM"), FourBitConfig("int4", None, group_size=32))
    export_gguf(model, tmp_path / "model.gguf", TOKENIZER, embedding="f32")
    assert divergence(model, tmp_path / "model.gguf") > 0.1


def test_gpt_oss_as_it_is_shipped(tmp_path: Path) -> None:
    """Experts in MXFP4, everything else in bfloat16."""
    config = FourBitConfig("mxfp4", None, target_modules=("experts",))
    model = convert_to_4bit(tiny("GptOssForCausalLM").bfloat16(), config)
    export_gguf(model, tmp_path / "model.gguf", TOKENIZER)
    kinds = types(tmp_path / "model.gguf")
    assert {kinds[f"blk.1.ffn_{part}_exps.weight"] for part in ("gate", "up", "down")} == {"MXFP4"}
    assert kinds["blk.1.attn_q.weight"] == kinds["blk.1.ffn_gate_inp.weight"] == "BF16"
    assert kinds["blk.1.ffn_down_exps.bias"] == kinds["blk.1.attn_sinks.weight"] == "F32"
    assert divergence(model, tmp_path / "model.gguf") < 0.02


def test_experts_that_stay_in_high_precision(tmp_path: Path) -> None:
    config = FourBitConfig("int4", None, group_size=32, modules_to_not_convert=("lm_head", "experts"))
    model = convert_to_4bit(tiny("GptOssForCausalLM"), config)
    export_gguf(model, tmp_path / "model.gguf", TOKENIZER)
    assert types(tmp_path / "model.gguf")["blk.0.ffn_up_exps.weight"] == "F32"
    assert divergence(model, tmp_path / "model.gguf") < 0.02


ROPES = {
    "linear": {},
    "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {},
    "yarn-attention": {"attention_factor": 0.5},
    "yarn-mscale": {"mscale": 2.0, "mscale_all_dim": 0.5},
    "yarn-mscale-alone": {"mscale": 2.0},
    "yarn-no-factor": {"factor": None},
}


@pytest.mark.parametrize(
    ("name", "rope"),
    [
        *(("LlamaForCausalLM", rope) for rope in ROPES),
        *((name, "yarn-attention") for name in ("Qwen3ForCausalLM", *MIXTURES)),
    ],
)
def test_scaled_rotary_embeddings(name: str, rope: str, tmp_path: Path) -> None:
    scaling = {"rope_type": rope.partition("-")[0], **SCALING, **ROPES[rope]}
    model = convert_to_4bit(
        tiny(name, rope_parameters=scaling, rope_scaling=scaling), FourBitConfig("int4", None, group_size=32)
    )
    export_gguf(model, tmp_path / "model.gguf", TOKENIZER, embedding="f32")
    assert divergence(model, tmp_path / "model.gguf") < 0.02


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Gemma2ForCausalLM", {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 3.0}),
        ("Gemma3ForCausalLM", {"final_logit_softcapping": 3.0}),
        ("Gemma2ForCausalLM", {"head_dim": 64, "query_pre_attn_scalar": 32, "num_hidden_layers": 46}),
        ("Gemma3ForCausalLM", {"head_dim": 64, "query_pre_attn_scalar": 32, "num_hidden_layers": 62}),
        ("Qwen2MoeForCausalLM", {"qkv_bias": False}),
        ("GraniteForCausalLM", {"attention_bias": True, "mlp_bias": True}),
        ("Qwen3ForCausalLM", {"head_dim": 64}),
    ],
)
def test_options_of_an_architecture(name: str, options: dict, tmp_path: Path) -> None:
    options = {**({"initializer_range": 0.1} if options.get("num_hidden_layers", 0) > 40 else {}), **options}
    model = convert_to_4bit(tiny(name, **options), FourBitConfig("int4", None, group_size=32))
    export_gguf(model, tmp_path / "model.gguf", TOKENIZER, embedding="f32")
    assert divergence(model, tmp_path / "model.gguf") < 0.02


def tokenizers():
    """One for each pre-tokenizer that is known, and SentencePiece's."""
    for parts, name in PRE_TOKENIZERS.items():
        kind, value = parts[0]
        pre = {
            "bytes": lambda: None,
            "digits": lambda: pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            ),
            "split": lambda value=value: splitting(value),
        }[kind]()
        yield pytest.param(byte_level_tokenizer(pre), id=name)
    yield pytest.param(sentencepiece_tokenizer(), id="sentencepiece")


@pytest.mark.parametrize("tokenizer", tokenizers())
def test_texts_are_cut_into_the_same_tokens(tokenizer, tmp_path: Path) -> None:
    export_gguf(convert_to_4bit(tiny(), FourBitConfig("int4", None)), tmp_path / "model.gguf", tokenizer)
    engine = LlamaCpp(tmp_path / "model.gguf", context=64)
    for text in [*TEXT, "WE'LL see 123456 Größen, 東京!", "def f(x):\n    return x + 10\n"]:
        request = urllib.request.Request(
            f"{engine.server.listening_address}/tokenize",
            json.dumps({"content": text, "add_special": True}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=20) as answer:
            assert json.load(answer)["tokens"] == tokenizer(text)["input_ids"], text
