"""`repack_gguf`: float files of llama.cpp's converter, packed without any change, for whatever architecture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("gguf", reason="GGUF files need it; install the extra 'gguf'")

from hf_stablespam.quant import FourBitConfig, FourBitLinear, convert_to_4bit, export_gguf, repack_gguf
from hf_stablespam.quant.export import export_unpacked
from hf_stablespam.quant.export.unpacked import grid_weight
from tests.quant.export.gguf.models import byte_level_tokenizer, tiny, write_float_gguf
from tests.quant.export.gguf.test_export_gguf import field, read, types

INT4 = FourBitConfig("int4", None, group_size=64)


def convert(model: torch.nn.Module, file: Path, dtype: type = np.float16) -> Path:
    """The model's 4-bit numbers in a float file, by way of an unpacked checkpoint; a plain model as it is."""
    folder = file.with_suffix("")
    is_converted = any(isinstance(module, FourBitLinear) for module in model.modules())
    export_unpacked(model, folder) if is_converted else model.save_pretrained(folder)
    return write_float_gguf(folder, file, dtype)


@pytest.mark.parametrize("format", ["int4", "fp4_e1m2", "mxfp4"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_every_matrix_on_a_grid_is_packed_without_any_change(format: str, dtype: type, tmp_path: Path) -> None:
    model = convert_to_4bit(tiny("Qwen3ForCausalLM"), FourBitConfig(format, None, group_size=64))
    source = convert(model, tmp_path / "f16.gguf", dtype)
    assert repack_gguf(source, tmp_path / "packed.gguf", like=model) == []
    before, after, kinds = read(source), read(tmp_path / "packed.gguf"), types(tmp_path / "packed.gguf")
    expected = "MXFP4" if format == "mxfp4" else "Q4_0"
    assert sum(kind == expected for kind in kinds.values()) == 14
    assert all(
        torch.equal(after[name], before[name]) for name in before if name not in ("token_embd.weight", "output.weight")
    )
    assert kinds["token_embd.weight"] == "Q8_0"
    assert field(tmp_path / "packed.gguf", "strange.word") == "kept"
    assert field(tmp_path / "packed.gguf", "strange.list") == [3, 4]
    assert field(tmp_path / "packed.gguf", "tokenizer.ggml.tokens") == ["a", "b"]
    assert field(tmp_path / "packed.gguf", "general.file_type") == (38 if format == "mxfp4" else 2)


def test_experts_in_one_tensor_are_packed(tmp_path: Path) -> None:
    model = convert_to_4bit(tiny("MixtralForCausalLM").bfloat16(), INT4)
    source = convert(model, tmp_path / "f16.gguf")
    routers = repack_gguf(source, tmp_path / "packed.gguf", like=model)
    assert routers == [f"model.layers.{layer}.block_sparse_moe.gate.weight" for layer in (0, 1)]
    kinds = types(tmp_path / "packed.gguf")
    assert [kind for name, kind in kinds.items() if name.endswith((".w1.weight", ".w2.weight", ".w3.weight"))] == (
        ["Q4_0"] * 6
    )
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[3, 7] += 1.0
    with pytest.raises(ValueError, match=r"weights of model.layers.0.mlp.experts.down_proj \(1 of 512 rows\)"):
        repack_gguf(source, tmp_path / "other.gguf", like=model)


def test_our_own_file_and_the_repacked_one_hold_the_same_numbers(tmp_path: Path) -> None:
    """Written directly, and by way of the numbers: the same weights, in whatever codes."""
    model = convert_to_4bit(tiny(tie_word_embeddings=False).bfloat16(), INT4)
    export_gguf(model, tmp_path / "direct.gguf", byte_level_tokenizer())
    repack_gguf(convert(model, tmp_path / "f16.gguf"), tmp_path / "packed.gguf", like=model)
    direct, repacked = read(tmp_path / "direct.gguf"), read(tmp_path / "packed.gguf")
    assert torch.equal(direct["blk.1.ffn_down.weight"], repacked["model.layers.1.mlp.down_proj.weight"])
    assert torch.equal(direct["output.weight"], repacked["output.weight"])


def test_what_lies_on_no_grid_stays_as_it_is_and_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = convert_to_4bit(tiny("Qwen3ForCausalLM"), FourBitConfig("int4", None, group_size=32, keep_last_blocks=1))
    source = convert(model, tmp_path / "f16.gguf")
    plain = repack_gguf(source, tmp_path / "packed.gguf", embedding="f16")
    assert len(plain) == 7
    assert all(name.startswith("model.layers.1.") for name in plain)
    assert "7 matrices lie on no 4-bit grid and stay as they are: model.layers.1." in caplog.text
    assert types(tmp_path / "packed.gguf")[plain[0]] == "F16"


def test_a_file_that_is_not_of_this_run_is_refused(tmp_path: Path) -> None:
    model = convert_to_4bit(tiny("Qwen3ForCausalLM"), INT4)
    source = convert(model, tmp_path / "f16.gguf")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[5] += 1.0
    with pytest.raises(
        ValueError, match=r"does not hold the trained weights of model.layers.1.mlp.up_proj \(1 of 192 ro"
    ):
        repack_gguf(source, tmp_path / "packed.gguf", like=model)
    assert not (tmp_path / "packed.gguf").exists()


def test_nothing_on_a_grid_and_other_wrong_uses(tmp_path: Path) -> None:
    source, out = convert(tiny("Qwen3ForCausalLM"), tmp_path / "f16.gguf"), tmp_path / "packed.gguf"
    with pytest.raises(ValueError, match=r"no matrix of .*f16.gguf lies on a 4-bit grid \(Q4_0, MXFP4\); .* --outtype"):
        repack_gguf(source, out)
    with pytest.raises(FileExistsError, match=r"f16\.gguf exists"):
        repack_gguf(source, source)
    with pytest.raises(ValueError, match="file must be another than the source"):
        repack_gguf(source, source, overwrite=True)
    with pytest.raises(ValueError, match=r"like must be converted to 4 bits"):
        repack_gguf(source, out, like=tiny())
    nvfp4 = convert_to_4bit(tiny(), FourBitConfig.nvfp4())
    with pytest.raises(ValueError, match=r"weight='nvfp4' cannot be recovered .* export the model with export_4bit"):
        repack_gguf(source, out, like=nvfp4)
    assert not out.exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_unpacked_checkpoint_holds_the_numbers_of_the_grid(dtype: torch.dtype, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = convert_to_4bit(tiny("Qwen3ForCausalLM").to(dtype), INT4)
    export_unpacked(model, tmp_path, byte_level_tokenizer())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert loaded.dtype == torch.float32
    layer = "model.layers.1.mlp.down_proj"
    expected = grid_weight(model.get_submodule(layer))
    assert torch.equal(loaded.get_submodule(layer).weight, expected)
    assert torch.equal(expected.to(dtype), model.get_submodule(layer).quantized_weight())
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert (tmp_path / "tokenizer.json").exists()
