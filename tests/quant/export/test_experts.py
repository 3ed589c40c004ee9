"""Mixtures in packed checkpoints: plain `from_pretrained` gives the logits of training."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig
from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

from hf_stablespam import FourBitConfig, convert_to_4bit, export_4bit
from tests.quant.layers.mixtures import FAMILIES, SHAPE, TOKENS, experts_of, mixture, need_shared_form

need_shared_form()
pytest.importorskip("compressed_tensors", reason="export needs it; install the extra 'export'")

PACKED = {"int4": FourBitConfig(group_size=32), "mxfp4": FourBitConfig(weight="mxfp4", activation="mxfp4")}
ROUNDED = {"nvfp4": FourBitConfig.nvfp4(), "int4_asym": FourBitConfig(weight="int4_asym", group_size=32)}


def trained(config: FourBitConfig, family: str = "qwen3_moe", dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A model in bfloat16 (its parameters: the rotary buffer stays), or with float32 masters."""
    model = convert_to_4bit(mixture(family), config).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def expert_names(folder) -> list[str]:
    names: list[str] = []
    for file in sorted(folder.glob("*.safetensors")):
        names += [name for name in load_file(file) if "experts" in name]
    return names


def weight_only(model: nn.Module) -> nn.Module:
    """What a weight-only engine computes: the trained weights, activations as they are."""
    for module in model.modules():
        if hasattr(module, "recipe"):
            module.recipe = module.recipe._replace(activation=None)
    return model


def reloaded_logits(folder, **options) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options).eval()
    model.set_experts_implementation("grouped_mm")
    return model(TOKENS).logits


@pytest.mark.parametrize("name", [*PACKED, *ROUNDED])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_reload_has_the_trained_logits(tmp_path, family: str, name: str) -> None:
    config = {**PACKED, **ROUNDED}[name]
    model = trained(config, family)
    export_4bit(model, tmp_path, leave_unpackable=name in ROUNDED)
    # Zero points load only so, those of linear layers too.
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if name == "int4_asym" else {}
    torch.testing.assert_close(reloaded_logits(tmp_path, **options), weight_only(model)(TOKENS).logits, rtol=0, atol=0)
    names = expert_names(tmp_path)
    packs = name in PACKED and family != "gpt_oss"  # whose checkpoints hold all experts in one tensor
    assert sum(other.endswith(".weight_packed") for other in names) == (12 if packs else 0)
    assert sum(other.endswith("_blocks") for other in names) == (2 if (family, name) == ("gpt_oss", "mxfp4") else 0)
    assert not any(other.endswith(".weight") for other in names)


def test_float32_masters_and_several_files(tmp_path) -> None:
    """The weights packed are rounded from the masters, and not from their bfloat16 copies."""
    model = trained(PACKED["int4"], dtype=torch.float32)
    original = model.save_pretrained
    model.save_pretrained = lambda folder, **options: original(folder, max_shard_size="8KB", **options)
    export_4bit(model, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name in ("gate_up_proj", "down_proj"):
        assert torch.equal(getattr(experts_of(again), name), experts_of(model).quantized(name, torch.bfloat16))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ROUNDED["nvfp4"], "transformers does not read packed experts in nvfp4 right"),
        (ROUNDED["int4_asym"], "transformers does not read packed experts in int4_asym right"),
        (FourBitConfig(group_size=64), "layers cannot be packed: .* has 32 inputs"),
        (
            FourBitConfig(group_size=64, target_modules=("experts",)),
            r"the experts cannot be packed: .*\.experts has rows of 32, which groups of 64 do not divide",
        ),
    ],
)
def test_experts_without_a_packed_form_are_refused_unless_asked_for(tmp_path, config, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        export_4bit(trained(config), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_mixture_whose_experts_alone_are_converted(tmp_path) -> None:
    model = trained(FourBitConfig(group_size=32, target_modules=("experts",)))
    export_4bit(model, tmp_path)
    assert torch.equal(reloaded_logits(tmp_path), weight_only(model)(TOKENS).logits)


def test_a_router_that_transformers_keeps_in_float32_is_stored_so(tmp_path) -> None:
    sizes = {"intermediate_size": 32, "moe_intermediate_size": 32, "n_routed_experts": 4, "n_shared_experts": 1}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("dots1", **SHAPE, **sizes)).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16).eval()
    model.set_experts_implementation("grouped_mm")
    router = model.model.layers[0].mlp.gate
    assert router.weight.dtype is torch.float32
    router.weight.data.normal_()
    export_4bit(convert_to_4bit(model, PACKED["int4"]), tmp_path / "4bit")
    assert torch.equal(reloaded_logits(tmp_path / "4bit"), weight_only(model)(TOKENS).logits)


def test_training_goes_on_from_a_native_checkpoint_of_gpt_oss(tmp_path) -> None:
    """What it was loaded with is on the grid already, and stays what it is."""
    export_4bit(trained(PACKED["mxfp4"], "gpt_oss"), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    loaded = experts_of(model).gate_up_proj.detach().clone()
    convert_to_4bit(model, PACKED["mxfp4"])
    assert torch.equal(experts_of(model).quantized("gate_up_proj"), loaded)


def test_packed_experts_are_refused_before_training() -> None:
    model = mixture("gpt_oss")
    model.model.layers[0].mlp.experts = Mxfp4GptOssExperts(model.config)
    with pytest.raises(ValueError, match=r"experts must hold its weights as numbers .*Mxfp4Config\(dequantize=True\)"):
        convert_to_4bit(model, PACKED["mxfp4"])
