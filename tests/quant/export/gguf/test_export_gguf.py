"""`export_gguf`: the trained weights bit for bit, the rest as llama.cpp wants it, and a message for what cannot be."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("gguf", reason="GGUF files need it; install the extra 'gguf'")
from gguf import GGUFReader, TokenType, quants

from hf_stablespam.quant import FourBitConfig, FourBitLinear, convert_to_4bit, export_gguf
from hf_stablespam.quant.export.gguf import packed as packed_module
from hf_stablespam.quant.export.gguf.architectures import ARCHITECTURES
from hf_stablespam.quant.export.gguf.rope import interleave, rope_factors
from hf_stablespam.quant.layers.experts import FourBitExperts, weight_names
from tests.quant.export.gguf.models import (
    MIXTURES,
    VOCABULARY,
    byte_level_tokenizer,
    sentencepiece_tokenizer,
    splitting,
    tiny,
)

INT4 = FourBitConfig("int4", None, group_size=32)
TOKENIZER = byte_level_tokenizer()


def read(file: Path) -> dict[str, torch.Tensor]:
    """All tensors as float32."""
    return {
        tensor.name: torch.from_numpy(np.array(quants.dequantize(tensor.data, tensor.tensor_type)))
        for tensor in GGUFReader(file).tensors
    }


def types(file: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(file).tensors}


def field(file: Path, name: str):
    return GGUFReader(file).fields[name].contents()


def multiset(tensors: list[torch.Tensor]) -> list[bytes]:
    return sorted((row.float() + 0.0).numpy().tobytes() for tensor in tensors for row in tensor.flatten(0, -2))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_has_the_trained_weights_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = convert_to_4bit(tiny(name), INT4)
    export_gguf(model, tmp_path / "model.gguf", TOKENIZER)
    kinds, stored = types(tmp_path / "model.gguf"), read(tmp_path / "model.gguf")
    packed = [stored[key] for key, kind in kinds.items() if kind == "Q4_0"]
    trained = [m.quantized_weight() for m in model.modules() if isinstance(m, FourBitLinear)]
    blocks = [m for m in model.modules() if isinstance(m, FourBitExperts)]
    assert len(packed) == len(trained) + 3 * len(blocks)  # gate and up are two tensors in the file
    for block in blocks:
        trained += [w.mT if block.is_transposed else w for w in map(block.quantized, weight_names(block))]
    assert len(blocks) == (2 if name in MIXTURES else 0)
    assert multiset(packed) == multiset(trained)  # rows of query and key may be in another order
    assert kinds["token_embd.weight"] == "Q8_0"
    assert {kind for key, kind in kinds.items() if "norm" in key or "bias" in key} <= {"F32"}


@pytest.mark.parametrize(
    "config",
    [
        FourBitConfig("int4", None, group_size=128),
        FourBitConfig.gguf(),
        FourBitConfig("fp4_e1m2", None, group_size=64),
        FourBitConfig("int4", "int4", group_size=32, scale_dtype="float16", weight_block="2d"),
        FourBitConfig("mxfp4", "mxfp4"),
        FourBitConfig("nvfp4", "nvfp4", four_over_six=True),
    ],
    ids=lambda config: str(config.weight),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_format_and_master_dtype(config: FourBitConfig, dtype: torch.dtype, tmp_path: Path) -> None:
    model = convert_to_4bit(tiny().to(dtype), config)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    export_gguf(model, tmp_path / "model.gguf", TOKENIZER)
    stored = read(tmp_path / "model.gguf")
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    for key, layer in (("attn_q", attention.q_proj), ("attn_k", attention.k_proj), ("ffn_down", mlp.down_proj)):
        expected = layer.quantized_weight()
        if key != "ffn_down":
            expected = interleave(expected, expected.shape[0] // 32)
        numbers, scale = stored[f"blk.1.{key}.weight"], stored.get(f"blk.1.{key}.scale")
        if scale is None:
            assert torch.equal(numbers.to(dtype), expected)
        else:  # llama.cpp multiplies by the scale of the tensor last, training multiplied the scales first
            torch.testing.assert_close(
                numbers * scale, expected.float(), rtol=2e-7 if dtype.itemsize == 4 else 4e-3, atol=0
            )
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_what_is_not_4bit_is_stored_without_loss_or_as_asked(tmp_path: Path) -> None:
    config = FourBitConfig("int4", None, group_size=32, keep_last_blocks=1)
    model = convert_to_4bit(tiny("GemmaForCausalLM").to(torch.bfloat16), config)
    export_gguf(model, tmp_path / "model.gguf", TOKENIZER, embedding="f16")
    kinds, stored = types(tmp_path / "model.gguf"), read(tmp_path / "model.gguf")
    assert kinds["token_embd.weight"] == "F16"
    assert kinds["blk.1.ffn_up.weight"] == "BF16"
    assert torch.equal(stored["blk.1.ffn_up.weight"], model.model.layers[1].mlp.up_proj.weight.float())
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    assert torch.equal(stored["blk.0.attn_norm.weight"], model.model.layers[0].input_layernorm.weight.float() + 1)
    with pytest.raises(ValueError, match=r"embedding must be one of 'q8_0', 'f16', 'f32', got 'q4_0'"):
        export_gguf(model, tmp_path / "other.gguf", TOKENIZER, embedding="q4_0")


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_of_its_own_is_there_and_a_tied_one_is_not(tied: bool, tmp_path: Path) -> None:
    export_gguf(convert_to_4bit(tiny(tie_word_embeddings=tied), INT4), tmp_path / "model.gguf", TOKENIZER)
    assert types(tmp_path / "model.gguf").get("output.weight") == (None if tied else "Q8_0")


def test_a_head_trained_in_4_bits_is_packed(tmp_path: Path) -> None:
    config = FourBitConfig("int4", None, group_size=32, modules_to_not_convert=(), target_modules=("lm_head", "q_proj"))
    export_gguf(convert_to_4bit(tiny(tie_word_embeddings=False), config), tmp_path / "model.gguf", TOKENIZER)
    assert types(tmp_path / "model.gguf")["output.weight"] == "Q4_0"


def test_the_file_says_how_it_was_trained_and_what_the_tokenizer_is(tmp_path: Path) -> None:
    export_gguf(convert_to_4bit(tiny(), INT4), tmp_path / "model.gguf", TOKENIZER)
    file = tmp_path / "model.gguf"
    assert FourBitConfig.from_dict(json.loads(field(file, "four_bit_training.config"))) == INT4
    assert field(file, "tokenizer.ggml.model") == "gpt2"
    assert field(file, "tokenizer.ggml.pre") == "gpt-2"
    assert field(file, "tokenizer.chat_template") == TOKENIZER.chat_template
    assert field(file, "tokenizer.ggml.eos_token_id") == 0
    tokens, kinds = field(file, "tokenizer.ggml.tokens"), field(file, "tokenizer.ggml.token_type")
    assert len(tokens) == VOCABULARY  # the embedding is padded beyond the tokenizer
    assert tokens[-1] == f"[PAD{VOCABULARY - 1}]"
    assert kinds[-1] == TokenType.UNUSED
    assert kinds[0] == TokenType.CONTROL


def test_without_a_tokenizer_the_model_is_written_and_a_warning_says_what_is_missing(tmp_path, caplog) -> None:
    export_gguf(convert_to_4bit(tiny(), INT4), tmp_path / "model.gguf")
    assert "no tokenizer was given" in caplog.text
    assert "no vocabulary and no chat template" in caplog.text
    assert field(tmp_path / "model.gguf", "tokenizer.ggml.model") == "none"


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (lambda: byte_level_tokenizer(splitting("[a-z]+")), r"no known name in llama.cpp .*hf-stablespam repack"),
        (lambda: object(), r"processing_class must be a fast tokenizer, got object; .* hf-stablespam repack"),
    ],
    ids=["pre", "slow"],
)
def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused(tokenizer, message, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        export_gguf(convert_to_4bit(tiny(), INT4), tmp_path / "model.gguf", tokenizer())
    assert list(tmp_path.iterdir()) == []


def test_more_tokens_than_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"has 320 tokens, the embedding only 300 rows; call model.resize_token_embedd"
    ):
        export_gguf(convert_to_4bit(tiny(vocab_size=300), INT4), tmp_path / "model.gguf", TOKENIZER)


def test_a_sentencepiece_vocabulary(tmp_path: Path) -> None:
    export_gguf(convert_to_4bit(tiny(), INT4), tmp_path / "model.gguf", sentencepiece_tokenizer())
    file = tmp_path / "model.gguf"
    assert field(file, "tokenizer.ggml.model") == "llama"
    assert field(file, "tokenizer.ggml.add_space_prefix") is True
    assert field(file, "tokenizer.ggml.token_type")[3] == TokenType.BYTE
    assert field(file, "tokenizer.ggml.token_type")[0] == TokenType.UNKNOWN


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (
            FourBitConfig("int4_asym", None, group_size=32),
            {},
            r"weight='int4_asym' has no exact form in GGUF: .* train",
        ),
        (FourBitConfig("fp4_e2m1", None), {}, r"weight='fp4_e2m1' has no exact form in GGUF; train with one of 'int4'"),
        (FourBitConfig(None, "int4"), {}, r"weight=None has no exact form"),
        (
            FourBitConfig("int4", None, scale_dtype="float32"),
            {},
            r"scale_dtype='float32': .* scale_dtype='bfloat16' or",
        ),
        (FourBitConfig("int4", None, group_size=16), {}, r"group_size must be a multiple of 32 .* got 16; train with"),
        (FourBitConfig("int4", None, weight_outliers=2), {}, r"weight_outliers=2: .* train with weight_outliers=0"),
        (FourBitConfig("int4", None, hadamard="all"), {}, r"hadamard='all': .* hadamard='weight_grad' or None"),
        (
            INT4,
            {"intermediate_size": 200},
            r"layers.0.mlp.down_proj has 200 inputs, which blocks of 32 \(Q4_0\) do not",
        ),
        (
            FourBitConfig("nvfp4", None),
            {"intermediate_size": 96},
            r"down_proj has 96 inputs, which blocks of 64 \(NVFP4\) do not divide; name it in modules_to_not_convert",
        ),
        (INT4, {"hidden_act": "gelu"}, r"hidden_act must be 'silu' in llama.cpp's 'llama', got 'gelu'"),
        (
            FourBitConfig("int4", None, modules_to_not_convert=(), target_modules="lm_head"),
            {"tie_word_embeddings": True},
            r"lm_head.weight and model.embed_tokens.weight are one tensor.* name 'lm_head'|is the tied",
        ),
    ],
    ids=str,
)
def test_what_has_no_form_in_gguf_is_refused_with_a_remedy(config, options, message, tmp_path: Path) -> None:
    model = convert_to_4bit(tiny("MistralForCausalLM", **options), config)
    with pytest.raises(ValueError, match=message):
        export_gguf(model, tmp_path / "model.gguf", TOKENIZER)
    assert list(tmp_path.iterdir()) == []


def test_models_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    file = tmp_path / "model.gguf"
    with pytest.raises(ValueError, match=r"the model is not converted to 4 bits; call convert_to_4bit"):
        export_gguf(tiny(), file)
    other = GPTNeoXForCausalLM(
        GPTNeoXConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(ValueError, match=r"GPTNeoXForCausalLM cannot be written .* hf-stablespam repack F16.gguf OUT"):
        export_gguf(convert_to_4bit(other, INT4), file)
    with pytest.raises(ValueError, match=r"norm_topk_prob must be True in llama.cpp's 'qwen3moe', got False"):
        export_gguf(convert_to_4bit(tiny("Qwen3MoeForCausalLM", norm_topk_prob=False), INT4), file)
    with pytest.raises(ValueError, match=r"layers.0.mlp.experts has 96 inputs, which blocks of 64 \(NVFP4\) do not"):
        export_gguf(convert_to_4bit(tiny("Qwen3MoeForCausalLM", moe_intermediate_size=96), FourBitConfig.nvfp4()), file)
    with pytest.raises(ValueError, match=r"weight='nvfp4' cannot be written for llama.cpp's 'gpt-oss', which leaves"):
        export_gguf(convert_to_4bit(tiny("GptOssForCausalLM"), FourBitConfig.nvfp4()), file)
    with pytest.raises(ValueError, match=r"weight='nvfp4' cannot be written for llama.cpp's 'qwen2'"):
        export_gguf(convert_to_4bit(tiny("Qwen2ForCausalLM"), FourBitConfig.nvfp4()), file)
    model = convert_to_4bit(tiny(), INT4)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"nan or inf in model.layers.0.mlp.up_proj.weight"):
        export_gguf(model, file)
    adapted = get_peft_model(convert_to_4bit(tiny(), INT4), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"merge the adapter first: model = model.merge_and_unload\(\)"):
        export_gguf(adapted, file)
    assert list(tmp_path.iterdir()) == []


def test_scales_that_float16_cannot_hold_are_named(tmp_path: Path) -> None:
    model = convert_to_4bit(tiny(), INT4)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e-9)
    with pytest.raises(ValueError, match=r"blk.1.ffn_down.weight cannot be written as Q4_0: .* have no float16 form"):
        export_gguf(model, tmp_path / "model.gguf", TOKENIZER)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_kept_unless_asked(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_text("mine")
    model = convert_to_4bit(tiny(), INT4)
    with pytest.raises(FileExistsError, match=r"model.gguf exists; pass overwrite=True \(--overwrite\)"):
        export_gguf(model, file, TOKENIZER)
    assert file.read_text() == "mine"
    with pytest.raises(IsADirectoryError, match=r"got the folder"):
        export_gguf(model, tmp_path, TOKENIZER)
    export_gguf(model, file, TOKENIZER, overwrite=True)
    assert file.stat().st_size > 1000


def test_a_full_disk_leaves_nothing_and_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gguf

    file = tmp_path / "model.gguf"
    file.write_text("old")
    written = []

    def full_disk(self, tensor, *args):
        written.append(tensor)
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        return whole(self, tensor, *args)

    whole = gguf.GGUFWriter.write_tensor_data
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full_disk)
    with pytest.raises(OSError, match="No space left"):
        export_gguf(convert_to_4bit(tiny(), INT4), file, TOKENIZER, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    assert file.read_text() == "old"


@pytest.mark.parametrize("format", ["int4", "nvfp4"])
def test_a_difference_found_when_reading_back_is_an_error(format: str, tmp_path: Path, monkeypatch) -> None:
    def one_code_off(parts, ggml_type):
        packed = pack(parts, ggml_type)
        packed[5, -1] ^= 1
        return packed

    pack = packed_module.pack
    monkeypatch.setattr(packed_module, "pack", one_code_off)
    with pytest.raises(
        RuntimeError, match=r"blk.0.attn_q.weight: 1 of 16384 weights read back are not those that were"
    ):
        export_gguf(
            convert_to_4bit(tiny(), FourBitConfig(format, None, group_size=32)), tmp_path / "model.gguf", TOKENIZER
        )
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"install it with: pip install 'hf_stablespam\[gguf\]'"):
        export_gguf(convert_to_4bit(tiny(), INT4), tmp_path / "model.gguf")


def test_llama3s_scaling_of_the_rotary_embedding_is_transformers_own() -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 10000.0,
    }
    model = tiny(rope_parameters=scaling, rope_scaling=scaling)
    plain = 10000.0 ** -(torch.arange(0, 32, 2) / 32)
    torch.testing.assert_close(plain / rope_factors(model.config), model.model.rotary_emb.inv_freq)


def test_the_log_says_what_was_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="hf_stablespam"):
        export_gguf(convert_to_4bit(tiny(), INT4), tmp_path / "model.gguf", TOKENIZER)
    assert "exported 14 packed and " in caplog.text
