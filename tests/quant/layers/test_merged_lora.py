"""`FourBitConfig(adapters="merged")`: what was trained is what merging gives, bit for bit."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from torch import nn

from hf_stablespam.quant import FourBitConfig, FourBitLinear, convert_to_4bit, fixed_weights, restore_linear
from hf_stablespam.quant.layers.matmul import quantize_weight
from hf_stablespam.quant.layers.merged_lora import MergedLoraLinear
from hf_stablespam.trainer.callbacks.helpers.figures.quantization_error import squared_errors
from tests.quant.export.gguf.models import tiny

CONFIG = FourBitConfig("int4", None, group_size=32, adapters="merged")
IDS = torch.arange(24).view(2, 12)


def adapted(config: FourBitConfig = CONFIG, first: str = "convert", dtype=torch.float32, **options):
    """A tiny Llama with an adapter whose B is not zero, so that it does something."""
    model = tiny(attention_bias=True, tie_word_embeddings=False).to(dtype)
    if first == "convert":
        convert_to_4bit(model, config)
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "up_proj"], **options}
    model = get_peft_model(model, LoraConfig(**options))
    if first == "peft":
        convert_to_4bit(model, config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
        elif "magnitude" in name:
            parameter.data *= 1.3
    return model


def layer_of(model) -> MergedLoraLinear:
    return model.base_model.model.model.layers[1].self_attn.q_proj


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


CASES = {
    "lora": ({}, {}),
    "rslora": ({}, {"use_rslora": True}),
    "dora": ({}, {"use_dora": True}),
    "bias": ({}, {"lora_bias": True, "target_modules": ["q_proj", "k_proj", "v_proj"]}),
    "W4A4": ({"activation": "int4"}, {}),
    "signed": ({"weight": "int4_signed"}, {}),
    "gradient": ({"weight": "mxfp4", "gradient": "mxfp4", "gradient_rounding": "nearest"}, {}),
    "nvfp4": ({"weight": "nvfp4"}, {}),
    "hadamard": ({"hadamard": "all"}, {}),
}


@pytest.mark.parametrize("first", ["convert", "peft"])
@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_merging_changes_no_logit(case: str, safe: bool, first: str) -> None:
    fields, options = CASES[case]
    model = adapted(FourBitConfig(**{**CONFIG.to_dict(), **fields}), first, **options)
    assert type(layer_of(model)) is MergedLoraLinear
    before = logits(model)
    merged = model.merge_and_unload(safe_merge=safe)
    assert isinstance(merged.model.layers[1].self_attn.q_proj, FourBitLinear)
    assert torch.equal(logits(merged), before)
    assert not torch.equal(before, logits(adapted(FourBitConfig("int4", None, group_size=32), **options)))


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("safe", [False, True])
def test_a_bfloat16_model_too(adapter_dtype: torch.dtype, safe: bool) -> None:
    model = adapted(dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter_dtype)
    before = logits(model)
    assert torch.equal(logits(model.merge_and_unload(safe_merge=safe)), before)


def reference(layer: MergedLoraLinear, x: torch.Tensor) -> torch.Tensor:
    """The straight-through formula with autograd alone: the whole gradient of the merged weight, then of A and B."""
    base = layer.get_base_layer()
    weight = layer.merged_weight()
    rounded = weight + (quantize_weight(weight, base.recipe, weight.dtype) - weight).detach()
    quantizer = base.recipe.activation
    x_q = x if quantizer is None else x + (quantizer(x) - x).detach()
    return nn.functional.linear(x_q, rounded, layer._bias(layer._active()))


@pytest.mark.parametrize("case", ["lora", "rslora", "dora", "bias", "W4A4", "signed"])
def test_gradients_are_those_of_the_merged_weight(case: str) -> None:
    fields, options = CASES[case]
    layer = layer_of(adapted(FourBitConfig(**{**CONFIG.to_dict(), **fields}), **options)).train()
    x, upstream = torch.randn(2, 7, 128), torch.randn(2, 7, 128)
    found = []
    for forward in (layer, lambda x: reference(layer, x)):
        layer.zero_grad()
        inputs = x.clone().requires_grad_()
        (forward(inputs) * upstream).sum().backward()
        trained = [p.grad for name, p in layer.named_parameters() if "lora" in name and p.grad is not None]
        found.append([inputs.grad, *trained])
    assert len(found[0]) >= 3
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def expected(layer: MergedLoraLinear, x: torch.Tensor) -> torch.Tensor:
    base, weight = layer.get_base_layer(), layer.merged_weight()
    rounded = quantize_weight(weight, base.recipe, weight.dtype, base.shared_amax())
    return nn.functional.linear(x, rounded, layer._bias(layer._active()))


@pytest.mark.parametrize("write", ["trace", "data"])
def test_the_weight_is_that_of_the_present_matrices_between_micro_batches_too(write: str) -> None:
    layer, x = layer_of(adapted()).train(), torch.randn(3, 128)
    for factor in (2.0, 0.5, -1.0):
        layer(x).sum().backward()
        for parameter in layer.lora_B.parameters():
            if write == "data":
                parameter.data *= factor  # of which PyTorch leaves no trace
            else:
                with torch.no_grad():
                    parameter.mul_(factor)
        assert torch.equal(layer(x), expected(layer, x))


def test_generation_rounds_once_and_sees_every_traced_change(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_stablespam.quant.layers import merged_lora

    model = adapted(FourBitConfig("nvfp4", None, adapters="merged")).eval()
    layer, x = layer_of(model), torch.randn(3, 128)
    partner = model.base_model.model.model.layers[1].self_attn.k_proj
    made = []
    original = merged_lora.quantize_weight
    monkeypatch.setattr(merged_lora, "quantize_weight", lambda *a: made.append(1) or original(*a))
    with torch.no_grad(), fixed_weights(model):
        assert torch.equal(layer(x), layer(x))
        assert len(made) == 1
        for changed in (layer.lora_A, partner.lora_B):  # the partner's maximum is in the shared scale
            changed["default"].weight.mul_(30.0)
            assert torch.equal(layer(x), expected(layer, x))
        layer.scaling["default"] *= 2
        assert torch.equal(layer(x), expected(layer, x))
        assert len(made) == 4
        model.disable_adapter_layers()
        assert torch.equal(layer(x), layer.get_base_layer()(x))
        model.enable_adapter_layers()
        assert torch.equal(layer(x), expected(layer, x))
    for parameter in layer.lora_B.parameters():
        parameter.data *= 2.0
    assert torch.equal(layer(x), expected(layer, x))


def test_training_lowers_the_loss_and_merging_keeps_it() -> None:
    model = adapted().train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(8):
        for _ in range(2):
            loss = model(IDS, labels=IDS).loss
            loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] * 0.95
    before = logits(model)
    assert torch.equal(logits(model.merge_and_unload()), before)


def test_several_adapters_switching_disabling_and_unmerging() -> None:
    model = adapted()
    first = logits(model)
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "up_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B.second" in name:
            nn.init.normal_(parameter, std=0.3)
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    second = logits(model)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    assert not torch.equal(first, second)
    assert not torch.equal(both, second)
    with model.disable_adapter():
        plain = logits(model)
    assert torch.equal(plain, logits(convert_to_4bit(tiny(attention_bias=True, tie_word_embeddings=False), CONFIG)))
    model.merge_adapter()
    assert torch.equal(logits(model), both)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), both, rtol=0.05, atol=0.05)
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.equal(logits(merged), logits(model))


def test_saving_loading_pickling_autocast_and_checkpointing(tmp_path) -> None:
    model = adapted()
    before = logits(model)
    model.save_pretrained(tmp_path)
    base = convert_to_4bit(tiny(attention_bias=True, tie_word_embeddings=False), CONFIG)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert type(layer_of(loaded)) is MergedLoraLinear
    assert torch.equal(logits(loaded), before)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), before)
    with torch.autocast("cpu", torch.bfloat16):
        low = logits(model)
        assert torch.equal(logits(copy.deepcopy(model).merge_and_unload()), low)
    gradients = []
    for checkpointing in (False, True):
        model.train().zero_grad()
        model.base_model.model.gradient_checkpointing_disable()
        if checkpointing:
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        model(IDS, labels=IDS).loss.backward()
        gradients.append(layer_of(model).lora_A["default"].weight.grad.clone())
    assert torch.equal(*gradients)


def test_restored_it_is_pefts_own() -> None:
    model = restore_linear(adapted())
    assert type(layer_of(model)) is lora.Linear
    assert type(layer_of(model).get_base_layer()) is nn.Linear
    assert logits(model).shape == (2, 12, 384)


@pytest.mark.parametrize("first", ["convert", "peft"])
def test_what_has_no_merged_weight_is_refused_by_name(first: str) -> None:
    with pytest.raises(ValueError, match=r"lora_dropout must be 0, got 0.1 for 'default': .* set lora_dropout=0, or"):
        adapted(first=first, lora_dropout=0.1)
    with pytest.raises(ValueError, match=r"lora_bias=True of 'default' needs a layer with a bias"):
        adapted(first=first, lora_bias=True)
    model = adapted(first=first)
    with pytest.raises(ValueError, match=r"a batch of several adapters \(adapter_names\) has no single merged weight"):
        model.eval()(IDS, adapter_names=["default", "__base__"])


def test_separate_adapters_are_left_to_peft() -> None:
    model = adapted(FourBitConfig("int4", None, group_size=32))
    assert type(layer_of(model)) is lora.Linear
    with pytest.raises(ValueError, match="adapters must be one of 'separate', 'merged', got 'both'"):
        FourBitConfig(adapters="both")


def test_the_weight_that_is_shown_and_measured_is_the_one_that_is_rounded():
    model = adapted()
    layer = layer_of(model).base_layer
    merged, plain = layer.quantized_weight(), quantize_weight(layer.weight, layer.recipe, torch.float32)
    assert torch.equal(merged, quantize_weight(layer.effective_weight(), layer.recipe, torch.float32))
    assert not torch.equal(merged, plain)
    names, sums = squared_errors(model)
    row = sums[next(index for index, name in enumerate(names) if "layers.1.self_attn.q_proj" in name)]
    wanted = [layer.effective_weight(), layer.effective_weight() - merged]
    torch.testing.assert_close(row, torch.stack([part.detach().square().sum() for part in wanted]))
    with model.disable_adapter():
        assert torch.equal(layer.quantized_weight(), plain)
