"""A model whose parts were converted with different configurations: exports that keep each apart, or refuse it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("compressed_tensors", reason="export needs it; install the extra 'export'")
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_stablespam.quant import FourBitConfig, convert_to_4bit, export_4bit, export_gguf, repack_gguf
from hf_stablespam.quant.export.compressed_tensors import check_activations
from hf_stablespam.quant.export.unpacked import export_unpacked, grid_experts, grid_weight
from tests.quant.export.gguf.models import tiny, write_float_gguf
from tests.quant.layers import mixtures

INT4 = FourBitConfig("int4", None, group_size=32)
MXFP4 = FourBitConfig("mxfp4", None)
NVFP4 = FourBitConfig.nvfp4()


def halves(first: FourBitConfig, second: FourBitConfig, name: str = "Qwen3ForCausalLM") -> Any:
    model = tiny(name)
    convert_to_4bit(model.model.layers[0], first)
    convert_to_4bit(model.model.layers[1], second)
    return model


@pytest.mark.parametrize(
    ("options", "given"),
    [
        ({"group_size": 64}, "group_size=32 in 'model.layers.0.self_attn.q_proj' and group_size=64 in 'model.layers.1"),
        ({"weight": None}, "weight='int4'.* and weight=None"),
        ({"weight_block": "2d"}, "weight_block='1d' in .* and weight_block='2d'"),
        ({"weight": "mxfp4"}, "weight='int4' in .* and weight='mxfp4'"),
    ],
)
def test_a_packed_checkpoint_has_one_configuration(options: dict, given: str, tmp_path: Path) -> None:
    second = FourBitConfig(**{"weight": "int4", "activation": "int4", "group_size": 32, **options})
    with pytest.raises(
        ValueError, match=f"all 4-bit layers must have one configuration .*{given}.*; write the numbers"
    ):
        export_4bit(halves(INT4, second), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_no_weight_depends_on_may_differ(tmp_path: Path) -> None:
    second = FourBitConfig("int4", "int4", "int4", group_size=32, cache_weights=False, target_modules=("down_proj",))
    model = halves(INT4, second).bfloat16()
    export_4bit(model, tmp_path)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    packed(torch.arange(16)[None])  # unpacks the weights
    for layer in (0, 1):
        trained = model.model.layers[layer].mlp.down_proj.quantized_weight()
        assert torch.equal(packed.model.layers[layer].mlp.down_proj.weight, trained)


def test_every_layer_must_have_rounded_its_inputs_as_the_engine_does() -> None:
    model = halves(NVFP4, FourBitConfig("nvfp4", None))
    check_activations(model, activations=False, calibration=None)
    with pytest.raises(ValueError, match=r"activations=True needs .* weight='nvfp4', activation=None"):
        check_activations(model, activations=True, calibration=[{}])


def test_unpacked_numbers_are_those_of_each_layers_own_grid(tmp_path: Path) -> None:
    model = halves(INT4, MXFP4)
    export_unpacked(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for layer in (0, 1):
        key = f"model.layers.{layer}.mlp.up_proj"
        assert torch.equal(stored[f"{key}.weight"], grid_weight(model.get_submodule(key)))


@pytest.mark.skipif(
    not mixtures.HAS_SHARED_FORM, reason="this transformers has no experts of the form that is converted"
)
def test_experts_are_rounded_beside_layers_that_are_not(tmp_path: Path) -> None:
    model = mixtures.mixture("gpt_oss")
    convert_to_4bit(model.model.layers[0].self_attn, FourBitConfig(None, "int4", group_size=32))
    convert_to_4bit(model.model.layers[0].mlp, INT4)
    export_unpacked(model, tmp_path)
    key = "model.layers.0.mlp.experts"
    expected = grid_experts(model.get_submodule(key), "down_proj")
    assert torch.equal(load_file(tmp_path / "model.safetensors")[f"{key}.down_proj"], expected)


def test_a_transform_of_any_layer_is_refused(tmp_path: Path) -> None:
    model = halves(INT4, FourBitConfig("int4", None, group_size=32, hadamard="all"))
    with pytest.raises(ValueError, match=r"hadamard='all' in 'model.layers.1.self_attn.q_proj'"):
        export_unpacked(model, tmp_path / "out")


class TestGGUF:
    @pytest.fixture(autouse=True)
    def need_gguf(self) -> None:
        pytest.importorskip("gguf", reason="GGUF files need it; install the extra 'gguf'")

    def test_every_tensor_has_the_type_of_its_layer(self, tmp_path: Path) -> None:
        from tests.quant.export.gguf.test_export_gguf import field, read, types

        model, file = halves(INT4, MXFP4), tmp_path / "model.gguf"
        export_gguf(model, file)
        kinds, stored = types(file), read(file)
        for layer, kind in ((0, "Q4_0"), (1, "MXFP4")):
            trained = model.model.layers[layer].mlp.up_proj.quantized_weight()
            assert kinds[f"blk.{layer}.ffn_up.weight"] == kind
            assert torch.equal(stored[f"blk.{layer}.ffn_up.weight"], trained)
        noted = json.loads(field(file, "four_bit_training.configs"))
        assert [FourBitConfig.from_dict(part["config"]) for part in noted] == [INT4, MXFP4]
        assert all(name.startswith("model.layers.1.") for name in noted[1]["layers"])

    @pytest.mark.parametrize(
        ("second", "message"),
        [
            (FourBitConfig(None, "int4"), r"model.layers.1.self_attn.q_proj: weight=None has no exact form in GGUF"),
            (FourBitConfig("int4", None, group_size=48), "group_size must be a multiple of 32 .* got 48"),
            (FourBitConfig("nvfp4", None), "weight='nvfp4' cannot be written for llama.cpp's 'qwen2'"),
        ],
    )
    def test_what_any_layer_forbids_is_refused(self, second: FourBitConfig, message: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=message):
            export_gguf(halves(INT4, second, "Qwen2ForCausalLM"), tmp_path / "model.gguf")

    def test_repacking_looks_for_the_grids_of_all_layers(self, tmp_path: Path) -> None:
        from tests.quant.export.gguf.test_export_gguf import types

        model = halves(INT4, MXFP4)
        export_unpacked(model, tmp_path / "unpacked")
        source = write_float_gguf(tmp_path / "unpacked", tmp_path / "f32.gguf", np.float32)
        assert repack_gguf(source, tmp_path / "packed.gguf", like=model) == []
        kinds = types(tmp_path / "packed.gguf")
        assert [kinds[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in (0, 1)] == ["Q4_0", "MXFP4"]
        with pytest.raises(ValueError, match="weight='nvfp4' cannot be recovered"):
            repack_gguf(source, tmp_path / "other.gguf", like=halves(INT4, NVFP4))
