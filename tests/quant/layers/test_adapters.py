"""Adapters of PEFT over 4-bit layers: what they compute and merge to, and which are refused, whichever came first."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

from hf_stablespam import register, unregister
from hf_stablespam.quant import FourBitConfig, FourBitLinear, convert_to_4bit, restore_linear
from hf_stablespam.quant.export import export_unpacked
from hf_stablespam.quant.export.checks import check_packable
from hf_stablespam.quant.export.gguf.checks import check_gguf
from tests.quant.export.gguf.models import tiny

CONFIG = FourBitConfig("int4", None, group_size=8)
GO_PAST = {
    "hra": ("HRAConfig", {}),
    "shira": ("ShiraConfig", {"r": 2}),
    "frod": ("FrodConfig", {}),
    "supertuning": ("SupertuningConfig", {}),
    "miss_bat": ("MissConfig", {"r": 8, "init_weights": "bat"}),
    "glora": ("GloraConfig", {"r": 2}),  # calls the layer, and subtracts what it gives
}
# What the layer under it gives, changed or with something added, is what these give.
COMPUTE_WITH_IT = {
    "lora": ("LoraConfig", {}),
    "rslora": ("LoraConfig", {"use_rslora": True}),
    "lora_bias": ("LoraConfig", {"lora_bias": True}),
    "gaussian": ("LoraConfig", {"init_lora_weights": "gaussian"}),
    "pissa": ("LoraConfig", {"init_lora_weights": "pissa"}),
    "olora": ("LoraConfig", {"init_lora_weights": "olora"}),
    "orthogonal": ("LoraConfig", {"init_lora_weights": "orthogonal"}),
    "mica": ("LoraConfig", {"init_lora_weights": "mica"}),
    "adalora": ("AdaLoraConfig", {"total_step": 10, "init_r": 4, "target_r": 2}),
    "loha": ("LoHaConfig", {}),
    "lokr": ("LoKrConfig", {}),
    "ia3": ("IA3Config", {"feedforward_modules": []}),
    "ia3_feedforward": ("IA3Config", {"feedforward_modules": ["0"]}),
    "oft": ("OFTConfig", {"oft_block_size": 8}),
    "boft": ("BOFTConfig", {"boft_block_size": 8}),
    "vera": ("VeraConfig", {"r": 4}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 20}),
    "waveft": ("WaveFTConfig", {"n_frequency": 32}),
    "c3a": ("C3AConfig", {"block_size": 16}),
    "miss": ("MissConfig", {"r": 8}),
    "road": ("RoadConfig", {"group_size": 32}),
    "randlora": ("RandLoraConfig", {"r": 4}),
    "delora": ("DeloraConfig", {}),
    "gralora": ("GraloraConfig", {"r": 8, "gralora_k": 2}),
    "vblora": ("VBLoRAConfig", {"r": 4, "num_vectors": 16, "vector_length": 32}),
    "tinylora": ("TinyLoraConfig", {"r": 4, "u": 4}),
    "unilora": ("UniLoraConfig", {"r": 4}),
    "adamss": ("AdamssConfig", {"r": 8, "num_subspaces": 2}),
    "deft": ("DeftConfig", {"r": 4}),
    "psoft": ("PsoftConfig", {"r": 8}),
    "osf": ("OSFConfig", {}),
}


def config_of(kind: str, options: dict[str, Any], targets: tuple[str, ...] = ("0",)) -> Any:
    """The configuration of a kind of adapter, where the installed PEFT has it."""
    if not hasattr(peft, kind):
        pytest.skip(f"this PEFT has no {kind}")
    return getattr(peft, kind)(target_modules=list(targets), **options)


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))


def converted(config: Any, first: str, four_bit: FourBitConfig = CONFIG, training: bool = True) -> Any:
    """A model in 4 bits with an adapter over it, in either order."""
    if first == "peft":
        return convert_to_4bit(get_peft_model(plain(), config).train(training), four_bit)
    return get_peft_model(convert_to_4bit(plain(), four_bit).train(training), config)


@pytest.mark.parametrize("first", ["convert", "peft"])
@pytest.mark.parametrize("name", GO_PAST)
def test_an_adapter_that_goes_past_its_layer_is_refused_by_name(name: str, first: str) -> None:
    """Of PEFT's: these multiply by a changed copy of the weight."""
    config = config_of(*GO_PAST[name])
    if name == "glora" and first == "convert":
        with pytest.raises(ValueError, match=r"FourBitLinear.* is not a plain torch\.nn\.Linear"):
            converted(config, first)
        return
    with pytest.raises(ValueError, match=r"0 is an adapter \(peft.* that makes no use of the 4-bit"):
        converted(config, first)
    kept = FourBitConfig("int4", None, group_size=8, modules_to_not_convert=("0",))
    converted(config_of(*GO_PAST[name]), first, kept)


@pytest.mark.parametrize("name", COMPUTE_WITH_IT)
def test_an_adapter_computes_with_the_rounded_weight_and_merges_into_the_other(name: str) -> None:
    model, x = converted(config_of(*COMPUTE_WITH_IT[name]), "convert"), torch.randn(3, 5, 32)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    plainly = restore_linear(copy.deepcopy(model))
    rounded = copy.deepcopy(model)
    for layer in rounded.modules():
        if isinstance(layer, FourBitLinear):
            layer.weight.data = layer.quantized_weight()
    rounded = restore_linear(rounded)
    for training in (True, False):
        given = model.train(training)(x)
        torch.testing.assert_close(given, rounded.train(training)(x))
    given.sum().backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    with torch.no_grad():
        merged = restore_linear(model.merge_and_unload())(x)
        torch.testing.assert_close(merged, plainly.eval()(x), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(merged, rounded(x), rtol=1e-3, atol=1e-3)


def test_target_parameters_are_added_before_the_rounding() -> None:
    options = {"target_modules": [], "target_parameters": ["0.weight"], "r": 4}
    model, x = get_peft_model(convert_to_4bit(plain(), CONFIG), LoraConfig(**options)), torch.randn(3, 32)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    with torch.no_grad():
        trained = model(x)
        assert torch.equal(model.merge_and_unload()(x), trained)


@pytest.mark.parametrize("kind", ["PromptEncoderConfig", "PrefixTuningConfig", "ShadowConfig"])
def test_what_is_trained_beside_the_model_stays_in_high_precision(kind: str) -> None:
    if not hasattr(peft, kind):
        pytest.skip(f"this PEFT has no {kind}")
    options: dict[str, Any] = {} if kind == "ShadowConfig" else {"num_virtual_tokens": 2, "encoder_hidden_size": 16}
    options |= {"prefix_projection": True} if kind == "PrefixTuningConfig" else {}
    model = get_peft_model(tiny(), getattr(peft, kind)(task_type="CAUSAL_LM", **options))
    convert_to_4bit(model, FourBitConfig("int4", None, group_size=32))
    four_bit = [module for module in model.modules() if isinstance(module, FourBitLinear)]
    assert len(four_bit) == 14
    assert not any(parameter.requires_grad for module in four_bit for parameter in module.parameters())


@pytest.mark.parametrize("first", ["convert", "peft"])
@pytest.mark.parametrize("training", [True, False])
def test_dora_with_dropout_is_refused_where_it_would_be_trained(training: bool, first: str) -> None:
    """PEFT then multiplies by (m - 1)·W besides, in training only."""
    message = r"0: lora_dropout must be 0 for DoRA .* got 0.1 for 'default': .*; set lora_dropout=0, or use_dora"
    options = {"use_dora": True, "lora_dropout": 0.1}
    with pytest.raises(ValueError, match=message):
        converted(config_of("LoraConfig", options), first, training=training)
    converted(config_of("LoraConfig", {"use_dora": True}), first)
    converted(config_of("LoraConfig", {"lora_dropout": 0.1}), first)


@pytest.mark.parametrize("first", ["convert", "peft"])
def test_dora_with_dropout_may_be_evaluated(first: str) -> None:
    options = {"use_dora": True, "lora_dropout": 0.1}
    if first == "peft":
        model = get_peft_model(plain(), config_of("LoraConfig", options)).requires_grad_(False).eval()
        convert_to_4bit(model, CONFIG)
    else:
        config = config_of("LoraConfig", {**options, "inference_mode": True})
        model = get_peft_model(convert_to_4bit(plain(), CONFIG), config).eval()
    layer = model.base_model.model[0]
    layer.lora_magnitude_vector["default"].weight.data.mul_(3)
    x, base = torch.randn(4, 32), layer.get_base_layer()
    torch.testing.assert_close(layer(x), 3 * (base(x) - base.bias) + base.bias)


def test_an_adapter_that_is_added_later_is_looked_at_before_it_is_active() -> None:
    model = converted(LoraConfig(target_modules=["0"]), "convert")
    with pytest.raises(ValueError, match=r"lora_dropout must be 0 for DoRA .* got 0.1 for 'second'"):
        model.add_adapter("second", config_of("LoraConfig", {"use_dora": True, "lora_dropout": 0.1}))


def test_an_adapter_that_transformers_or_nobody_wraps_is_looked_at() -> None:
    with pytest.raises(ValueError, match="makes no use of the 4-bit layer"):
        peft.inject_adapter_in_model(config_of("HRAConfig", {}), convert_to_4bit(plain(), CONFIG))


def test_looking_at_an_adapter_leaves_the_random_numbers_alone() -> None:
    for first in ("convert", "peft"):
        model = converted(LoraConfig(target_modules=["0"], lora_dropout=0.5), first)
        state = torch.get_rng_state()
        convert_to_4bit(model, CONFIG)
        assert torch.equal(torch.get_rng_state(), state)


def test_without_our_wrappers_converting_again_looks_at_what_came_after_it() -> None:
    unregister()
    try:
        model = converted(config_of("HRAConfig", {}), "convert")
    finally:
        register()
    with pytest.raises(ValueError, match="makes no use of the 4-bit layer"):
        convert_to_4bit(model, CONFIG)


@pytest.mark.parametrize("first", ["convert", "peft"])
def test_adapters_merged_refuses_other_kinds(first: str) -> None:
    merged = FourBitConfig("int4", None, group_size=8, adapters="merged")
    with pytest.raises(ValueError, match=r"'merged' knows LoRA.*got peft.tuners.vera.layer.Linear in .*0; use one of"):
        converted(config_of("VeraConfig", {"r": 2}), first, merged)


def mixed_by_xlora(model: Any, folder: Any, adapters: str | None, first: str = "convert") -> Any:
    """X-LoRA over a tiny Llama, in 4 bits unless `adapters` is None, with two experts that do something."""
    targets = ["q_proj", "up_proj"]
    for seed in range(2):
        torch.manual_seed(seed)
        expert = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
        expert.save_pretrained(folder / str(seed))
    convert = [] if adapters is None else [replace(CONFIG, adapters=adapters)]
    if first == "convert":
        for config in convert:
            convert_to_4bit(model, config)
    torch.manual_seed(2)
    experts = {str(seed): str(folder / str(seed)) for seed in range(2)}
    options = {"hidden_size": model.config.hidden_size, "xlora_depth": 1, "adapters": experts}
    mixed = get_peft_model(model, peft.XLoraConfig(task_type="CAUSAL_LM", **options))
    if first == "peft":
        for config in convert:
            convert_to_4bit(mixed, config)
    return mixed


@pytest.mark.parametrize("first", ["convert", "peft"])
def test_xlora_mixes_its_experts_over_the_rounded_weight(first: str, tmp_path: Path) -> None:
    model, ids = tiny(use_cache=False), torch.arange(12)[None]
    rounded = copy.deepcopy(model)
    export_unpacked(convert_to_4bit(copy.deepcopy(model), CONFIG), tmp_path / "rounded")
    rounded.load_state_dict(load_file(tmp_path / "rounded" / "model.safetensors"), strict=False)
    expected = mixed_by_xlora(rounded, tmp_path, None)(ids).logits
    found = mixed_by_xlora(model, tmp_path, "separate", first)
    torch.testing.assert_close(found(ids).logits, expected)
    found(ids, labels=ids).loss.backward()
    trained = {name for name, param in found.named_parameters() if param.grad is not None and param.grad.any()}
    assert trained
    assert all("xlora_classifier" in name for name in trained)


@pytest.mark.parametrize("first", ["convert", "peft"])
def test_adapters_merged_refuses_xlora_which_passes_lora_by(first: str, tmp_path: Path) -> None:
    mixed = mixed_by_xlora(tiny(use_cache=False), tmp_path, "merged", first)
    with pytest.raises(ValueError, match="as X-LoRA does"):
        mixed(torch.arange(12)[None])


def test_the_layers_of_any_adapter_stay_in_high_precision() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(32, 32)), config_of("LilyConfig", {}))
    convert_to_4bit(model, CONFIG)
    four_bit = [name for name, module in model.named_modules() if isinstance(module, FourBitLinear)]
    assert four_bit == ["base_model.model.0.base_layer"]


@pytest.mark.parametrize("pattern", ["0", r"\d", r"(.*\.)?0"])
@pytest.mark.parametrize("first", ["convert", "peft"])
def test_a_layer_keeps_its_name_under_an_adapter(first: str, pattern: str, caplog: pytest.LogCaptureFixture) -> None:
    lora = LoraConfig(target_modules=["0", "1"])
    only = FourBitConfig("int4", None, group_size="auto", target_modules=(pattern,))
    model = converted(lora, first, only)
    four_bit = [name for name, module in model.named_modules() if isinstance(module, FourBitLinear)]
    expected = ["base_model.model.0.base_layer", "base_model.model.1.base_layer"]
    assert four_bit == (expected if pattern == r"\d" else expected[:1])
    convert_to_4bit(model, only)  # the same configuration again does nothing
    if pattern != r"\d":
        left = converted(lora, first, FourBitConfig("int4", None, group_size=8, modules_to_not_convert=(pattern,)))
        assert [name for name, module in left.named_modules() if isinstance(module, FourBitLinear)] == expected[1:]
    assert "does nothing" not in caplog.text


@pytest.mark.parametrize("config", [FourBitConfig.nvfp4(), CONFIG], ids=["nvfp4", "int4"])
def test_a_copy_of_one_of_the_layers_that_share_a_scale_is_refused(config: FourBitConfig) -> None:
    model = convert_to_4bit(tiny("LlamaForCausalLM"), config)
    lora = LoraConfig(target_modules=["gate_proj"], modules_to_save=["q_proj"])
    if config == CONFIG:
        assert isinstance(get_peft_model(model, lora), peft.PeftModel)  # its scales are its own
        return
    with pytest.raises(ValueError, match=r"q_proj.modules_to_save.default is a copy of a 4-bit layer that shares"):
        get_peft_model(model, lora)


@pytest.mark.parametrize("check", [check_packable, check_gguf, lambda model: export_unpacked(model, "nowhere")])
def test_no_export_takes_a_layer_that_shares_its_scale_with_copies(check: Any) -> None:
    model = convert_to_4bit(tiny("LlamaForCausalLM"), FourBitConfig.nvfp4())
    attention = model.model.layers[0].self_attn
    attention.q_proj = copy.deepcopy(attention.q_proj)
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj is a copy of a 4-bit layer that shares"):
        check(model)
