"""Pruned models in the files of engines: unequal widths where an engine has a form for them, else refused."""

import pytest
import torch
from safetensors.torch import load_file

from hf_stablespam import FourBitConfig, convert_to_4bit, export_4bit, export_gguf
from hf_stablespam.recipes.adapt_pruner import PruningPlan, load_pruned, prune_units
from tests.quant.export.gguf.models import VOCABULARY, byte_level_tokenizer, tiny

GROUPS = FourBitConfig("int4", None, group_size=32)
UNEQUAL = [{"neurons": range(64)}, {"neurons": range(32, 160), "kv_heads": [1]}]
ALIKE = [{"neurons": range(32, 96), "kv_heads": [1]}, {"neurons": range(64), "kv_heads": [0]}]


def pruned(name="LlamaForCausalLM", layers=UNEQUAL, config=GROUPS):
    model = tiny(name)
    prune_units(model, PruningPlan(layers))
    return convert_to_4bit(model, config)


@pytest.mark.parametrize(
    ("name", "layers"),
    [("LlamaForCausalLM", UNEQUAL), ("MistralForCausalLM", UNEQUAL), ("Qwen3ForCausalLM", ALIKE)],
    ids=["llama", "mistral", "qwen3 alike"],
)
def test_llama_cpp_computes_what_transformers_computes(name, layers, tmp_path):
    pytest.importorskip("gguf", reason="GGUF files need it; install the extra 'gguf'")
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: it is in the extra gguf-test")
    from tests.quant.export.gguf.test_llama_cpp import divergence

    model = pruned(name, layers)
    export_gguf(model, tmp_path / "model.gguf", byte_level_tokenizer(), embedding="f32")
    assert divergence(model, tmp_path / "model.gguf") < 0.02  # 8-bit activations; a wrong order is 0.1 and more


def test_where_llama_cpp_has_no_form(tmp_path):
    pytest.importorskip("gguf", reason="GGUF files need it; install the extra 'gguf'")
    with pytest.raises(
        ValueError, match=r"unequal widths, for which llama.cpp's 'qwen2' has no form.*equal_widths=True"
    ):
        export_gguf(pruned("Qwen2ForCausalLM"), tmp_path / "model.gguf")
    with pytest.raises(ValueError, match=r"weight='nvfp4' cannot be written for llama.cpp's 'deci'"):
        export_gguf(pruned(config=FourBitConfig("nvfp4", None)), tmp_path / "model.gguf")
    with pytest.raises(ValueError, match=r"llama.cpp's 'qwen2' needs 4 heads, got 2; prune with prune_attention=False"):
        export_gguf(pruned("Qwen2ForCausalLM", ALIKE), tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layers", [UNEQUAL, ALIKE], ids=["unequal", "alike"])
def test_packed_checkpoints(layers, tmp_path):
    """Packed by compressed-tensors, read by `load_pruned`: the logits of training."""
    pytest.importorskip("compressed_tensors", reason="packed checkpoints need it; install the extra 'export'")
    model = pruned(layers=layers)
    for parameter in model.parameters():  # not the buffers of the rotary embedding, which stay in float32
        parameter.data = parameter.data.bfloat16()
    ids = torch.arange(24).view(2, 12) % VOCABULARY
    export_4bit(model, tmp_path)
    if layers is UNEQUAL:
        assert "load_pruned" in (tmp_path / "config.json").read_text()
        loaded = load_pruned(tmp_path, dtype=torch.bfloat16)
    else:
        loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    packed = [name for name in load_file(tmp_path / "model.safetensors") if name.endswith("weight_packed")]
    assert len(packed) == 14
