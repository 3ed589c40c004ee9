"""One weight under several names: exports write it rounded under all of them, or refuse it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("compressed_tensors", reason="export needs it; install the extra 'export'")
pytest.importorskip("gguf", reason="GGUF files need it; install the extra 'gguf'")
from safetensors.torch import load_file

from hf_stablespam.quant import FourBitConfig, convert_to_4bit
from hf_stablespam.quant.export.checks import check_packable
from hf_stablespam.quant.export.gguf.checks import check_gguf
from hf_stablespam.quant.export.unpacked import export_unpacked, grid_experts
from tests.quant.export.gguf.models import tiny
from tests.quant.layers import mixtures

INT4 = FourBitConfig("int4", None, group_size=32)


@pytest.fixture
def shared_experts() -> Any:
    """A mixture whose two layers have the same experts, in 4 bits."""
    mixtures.need_shared_form()
    model = tiny("Qwen3MoeForCausalLM")
    model.model.layers[1].mlp.experts = model.model.layers[0].mlp.experts
    return convert_to_4bit(model, INT4)


@pytest.mark.parametrize("check", [check_packable, check_gguf])
def test_experts_under_two_names_are_refused_where_one_is_written(shared_experts: Any, check: Any) -> None:
    with pytest.raises(ValueError, match=r"name 'model.layers.0.mlp.experts' in modules_to_not_convert"):
        check(shared_experts)


def test_experts_under_two_names_are_rounded_under_both(shared_experts: Any, tmp_path: Path) -> None:
    export_unpacked(shared_experts, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for layer in (0, 1):
        grid = grid_experts(shared_experts.model.layers[0].mlp.experts, "down_proj")
        key = f"model.layers.{layer}.mlp.experts"
        assert torch.equal(torch.stack([stored[f"{key}.{e}.down_proj.weight"] for e in range(len(grid))]), grid)


def test_a_rounded_head_tied_to_an_embedding_is_not_written_unpacked(tmp_path: Path) -> None:
    config = FourBitConfig("int4", None, group_size=32, modules_to_not_convert=(), target_modules=("lm_head", "q_proj"))
    model = convert_to_4bit(tiny(tie_word_embeddings=True), config)
    with pytest.raises(
        ValueError, match=r"embed_tokens.weight is in high precision, and one tensor .*; name 'lm_head'"
    ):
        export_unpacked(model, tmp_path / "out")
