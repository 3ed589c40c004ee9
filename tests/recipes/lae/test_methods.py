"""The PEFT methods: what they start from, where they go, and that PEFT saves and loads them."""

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import ConvNextConfig, ConvNextModel, SwinConfig, SwinModel

from hf_stablespam.recipes.lae import CalibratedPrefixConfig, ParallelAdapterConfig, add_lae_adapters
from hf_stablespam.recipes.lae.adapters import active_expert, adapter_parameters, add_expert
from tests.recipes.lae.helpers import METHODS, Images, lora, tiny_bert, tiny_llama, tiny_vit

IMAGES = Images().images


def output_of(model, **inputs):
    return model.eval()(**inputs).last_hidden_state


def disturb(model, name="default", size=0.3):
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in adapter_parameters(model, name).values():
            parameter.add_(size * torch.randn_like(parameter))


@pytest.mark.parametrize("method", ["lora", "adapter"])
@pytest.mark.parametrize("calibrate", [True, False])
def test_a_new_adapter_changes_nothing(method, calibrate):
    plain = output_of(tiny_vit(), pixel_values=IMAGES)
    experts = add_lae_adapters(tiny_vit(), METHODS[method](), calibrate=calibrate)
    assert torch.equal(output_of(experts, pixel_values=IMAGES), plain)
    disturb(experts)
    assert not torch.equal(output_of(experts, pixel_values=IMAGES), plain)
    with experts.disable_adapter():
        assert torch.equal(output_of(experts, pixel_values=IMAGES), plain)
    scales = [value for key, value in adapter_parameters(experts, "default").items() if "scale" in key]
    assert len(scales) == (0 if not calibrate else 4 if method == "lora" else 2)


@pytest.mark.parametrize("method", METHODS)
def test_peft_saves_and_loads_it(method, tmp_path):
    experts = add_lae_adapters(tiny_vit(), METHODS[method](), calibrate=method != "lora")
    disturb(experts)
    expected = output_of(experts, pixel_values=IMAGES)
    experts.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path)
    assert torch.equal(output_of(loaded, pixel_values=IMAGES), expected)
    assert PeftConfig.from_pretrained(tmp_path).peft_type == experts.peft_config["default"].peft_type


def test_the_prefixes_weights_sum_to_one_and_the_others_stay():
    images = IMAGES[:2]
    plain = tiny_vit(attn_implementation="eager")
    before = plain(pixel_values=images, output_attentions=True).attentions[0]
    experts = add_lae_adapters(plain, CalibratedPrefixConfig(num_virtual_tokens=3))
    weights = experts(pixel_values=images, output_attentions=True).attentions[0]
    assert weights.shape[-1] == before.shape[-1] + 3
    torch.testing.assert_close(weights[..., 1:4].sum(-1), torch.ones(weights.shape[:-1]))
    others = torch.cat((weights[..., :1], weights[..., 4:]), -1)
    assert (others.sum(-1) < 1).all()  # the others still share the softmax with the prefix
    torch.testing.assert_close(others / others.sum(-1, keepdim=True), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("function", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_prefix_in_a_causal_model_sees_no_future(function, padded):
    llama = tiny_llama()
    llama.set_attn_implementation(function)
    experts = add_lae_adapters(llama, CalibratedPrefixConfig(num_virtual_tokens=2))
    disturb(experts, size=1.0)
    tokens = torch.arange(1, 17).view(2, 8)
    mask = torch.ones_like(tokens)
    if padded:
        mask[1, 6:] = 0
    inputs = {"input_ids": tokens, "attention_mask": mask, "use_cache": False}
    full = output_of(experts, **inputs)
    changed = tokens.clone()
    changed[:, 5] = 30
    other = output_of(experts, **(inputs | {"input_ids": changed}))
    torch.testing.assert_close(full[:, :5], other[:, :5])
    assert not torch.allclose(full[:, 5], other[:, 5])
    torch.testing.assert_close(  # token by token with a cache gives the same: the prefix never enters the cache
        full[:1], by_cache(experts, tokens[:1]), rtol=0, atol=1e-5
    )


def by_cache(model, tokens):
    cache, outputs = None, []
    for position in range(tokens.shape[1]):
        step = model(input_ids=tokens[:, position : position + 1], past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        outputs.append(step.last_hidden_state)
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("function", ["sdpa", "eager"])
def test_a_prefix_in_bert_leaves_padding_out(function):
    bert = tiny_bert()
    bert.set_attn_implementation(function)
    experts = add_lae_adapters(bert, CalibratedPrefixConfig(num_virtual_tokens=2))
    disturb(experts, size=1.0)
    tokens = torch.arange(1, 13).view(2, 6)
    mask = torch.ones_like(tokens)
    mask[:, 4:] = 0
    short = output_of(experts, input_ids=tokens[:, :4])
    padded = output_of(experts, input_ids=tokens, attention_mask=mask)
    torch.testing.assert_close(padded[:, :4], short, rtol=0, atol=1e-6)


def test_a_prefix_needs_the_attention_interface():
    class Deaf(torch.nn.Module):
        """An attention that never asks for a function."""

        def __init__(self):
            super().__init__()
            self.config = tiny_vit().config
            self.k_proj = torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.k_proj(x)

    experts = add_lae_adapters(torch.nn.Sequential(Deaf()), CalibratedPrefixConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="Deaf does not use transformers' attention interface"):
        experts(torch.ones(1, 4))
    experts = add_lae_adapters(tiny_vit(), CalibratedPrefixConfig())
    experts.base_model.model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation sdpa or eager, got 'flash_attention_2'"):
        experts(pixel_values=IMAGES)


def test_an_adapter_goes_beside_any_block_of_one_width():
    swin = SwinModel(
        SwinConfig(
            image_size=16, patch_size=2, num_channels=1, embed_dim=8, depths=[2, 1], num_heads=[2, 2], window_size=4
        ),
        add_pooling_layer=False,
    )
    convnext = ConvNextModel(ConvNextConfig(num_channels=1, depths=[1, 1], hidden_sizes=[8, 16], num_stages=2))
    for model, target in ((swin, r".*blocks\.\d+\.attention"), (convnext, r".*stages\.\d+\.layers\.\d+")):
        images = torch.randn(2, 1, 16, 16) if model is swin else torch.randn(2, 1, 32, 32)
        plain = output_of(model, pixel_values=images)
        experts = add_lae_adapters(model, ParallelAdapterConfig(target_modules=target, down_sample=0.5))
        # Adding zeros leaves other strides behind, and sums of another order.
        torch.testing.assert_close(output_of(experts, pixel_values=images), plain, rtol=0, atol=1e-6)
        layers = [m for m in experts.modules() if hasattr(m, "parallel_adapter_down")]
        assert {m.parallel_adapter_down["default"].out_features for m in layers} == {4, 8}
        disturb(experts)
        assert not torch.allclose(output_of(experts, pixel_values=images), plain)
        assert torch.equal(output_of(experts, pixel_values=images), output_of(experts, pixel_values=images))


def test_only_the_blocks_that_are_named_are_adapted():
    for config in (
        LoraConfig(r=2, target_modules=["k_proj"], layers_to_transform=[1], layers_pattern="layers"),
        ParallelAdapterConfig(layers_to_transform=[1], layers_pattern="layers"),
        CalibratedPrefixConfig(layers_to_transform=[1], layers_pattern="layers"),
    ):
        experts = add_lae_adapters(tiny_vit(), config)
        assert all("layers.1." in key for key in adapter_parameters(experts, "default"))
        assert adapter_parameters(experts, "default")


@pytest.mark.parametrize("method", METHODS)
def test_experts_are_switched_and_put_back(method):
    experts = add_lae_adapters(tiny_vit(), METHODS[method]())
    add_expert(experts, "offline")
    disturb(experts)
    trainable = {name: parameter.requires_grad for name, parameter in experts.named_parameters()}
    assert any(trainable.values())
    assert not any(value for name, value in trainable.items() if "offline" in name)
    online = output_of(experts, pixel_values=IMAGES)
    with active_expert(experts, "offline"):
        assert not torch.equal(output_of(experts, pixel_values=IMAGES), online)
    with pytest.raises(KeyError), active_expert(experts, "offline"):
        raise KeyError
    assert {name: parameter.requires_grad for name, parameter in experts.named_parameters()} == trainable
    assert torch.equal(output_of(experts, pixel_values=IMAGES), online)


def test_a_calibrated_lora_merges_with_its_scalar():
    experts = add_lae_adapters(tiny_vit(), lora())
    disturb(experts)
    expected = output_of(experts, pixel_values=IMAGES)
    merged = experts.merge_and_unload()
    torch.testing.assert_close(output_of(merged, pixel_values=IMAGES), expected, rtol=0, atol=1e-5)


def test_a_scale_that_is_a_number_is_fixed():
    for config in (ParallelAdapterConfig(scale=0.5), CalibratedPrefixConfig(scale=0.5)):
        experts = add_lae_adapters(tiny_vit(), config)
        assert not [key for key in adapter_parameters(experts, "default") if "scale" in key]
        assert experts(pixel_values=IMAGES).last_hidden_state.isfinite().all()
