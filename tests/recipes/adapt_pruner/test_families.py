"""Every dense model class of Llama's shape in transformers: cutting is setting to zero, and a folder brings it back."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from hf_stablespam.recipes.adapt_pruner import (
    LayerPlan,
    PruningPlan,
    adapt_prune,
    load_pruned,
    prune_units,
    save_pruned,
)
from hf_stablespam.recipes.adapt_pruner.model.layers import find_layers
from tests.recipes.adapt_pruner.models import batches, logits

TYPES = (
    *(
        "cohere",
        "cohere2",
        "cwm",
        "ernie4_5",
        "exaone4",
        "gemma",
        "gemma3_text",
        "granite",
        "helium",
        "hunyuan_v1_dense",
    ),
    *("hyperclovax", "llama", "ministral", "mistral", "olmo", "qwen2", "qwen3", "seed_oss", "smollm3", "stablelm"),
    "vaultgemma",
)
OWN_HEAD_DIM = ("helium", "stablelm")  # follows from the number of heads, whatever config.head_dim says
SHAPE = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0},
}
PLANS = {
    "equal": [LayerPlan(tuple(range(5, 24)), (1,))] * 2,
    "unequal": [LayerPlan(tuple(range(5, 24)), (1,)), LayerPlan(tuple(range(2, 9)), (0, 1))],
}


def model_of(name: str, **options):
    if name not in CONFIG_MAPPING_NAMES:
        pytest.skip(f"this transformers has no {name}")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**SHAPE, **options})).eval().float()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def zeroed(model, plan):
    """What the removed units give is multiplied by zero."""
    model = copy.deepcopy(model)
    for layer, kept in zip(find_layers(model), plan.layers, strict=True):
        width = layer.queries * layer.head_dim
        for neuron in set(range(layer.neurons)) - set(kept.neurons):
            layer.linear("down_proj").weight.data[:, neuron] = 0
        for head in set(range(layer.kv_heads)) - set(kept.kv_heads):
            layer.linear("o_proj").weight.data[:, head * width : (head + 1) * width] = 0
    return model


@pytest.mark.parametrize("widths", PLANS)
@pytest.mark.parametrize("name", TYPES)
def test_cut_saved_and_loaded(name, widths, tmp_path):
    model, plan = model_of(name), PruningPlan(PLANS[widths])
    whole, expected = logits(model), logits(zeroed(model, plan))
    prune_units(model, plan)
    torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=1e-5)
    assert not torch.allclose(expected, whole, atol=1e-3)
    save_pruned(model, tmp_path)
    loaded = load_pruned(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(loaded), logits(model))
    if widths == "equal" and name not in OWN_HEAD_DIM:
        assert torch.equal(logits(type(model).from_pretrained(tmp_path, dtype=torch.float32)), logits(model))


@pytest.mark.parametrize("name", OWN_HEAD_DIM)
def test_heads_of_a_class_that_has_its_own_width_of_them(name, tmp_path):
    model = model_of(name)
    whole = model.config.num_attention_heads
    prune_units(model, PruningPlan([LayerPlan(tuple(range(12)), None)] * 2))
    save_pruned(model, tmp_path / "neurons")  # heads are as they were, so that the config says all
    plain = type(model).from_pretrained(tmp_path / "neurons", dtype=torch.float32)
    assert torch.equal(logits(plain), logits(model))
    prune_units(model, PruningPlan([LayerPlan(None, (0,))] * 2))
    assert model.config.num_attention_heads == whole
    model.save_pretrained(tmp_path / "plain")  # as the Trainer saves it, without pruning.json
    save_pruned(model, tmp_path / "heads")
    for folder in ("plain", "heads"):
        loaded = load_pruned(tmp_path / folder, dtype=torch.float32)
        assert torch.equal(logits(loaded), logits(model))
        prune_units(loaded, PruningPlan([LayerPlan(tuple(range(6)), None)] * 2))
    with pytest.raises(Exception, match="load_pruned"):
        type(model).from_pretrained(tmp_path / "heads")
    loaded = load_pruned(tmp_path / "heads", dtype=torch.float32)
    assert adapt_prune(loaded, 0.9, batches(), steps=20, show_progress=False).reached


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("stablelm", {"qk_layernorm": True}, r"parameter q_layernorm\.norms\.0\.weight of shape \(8,\)"),
        ("diffllama", {"num_key_value_heads": 4}, r"DiffLlama\w+ has a parameter lambda_q1 of shape \(8,\)"),
        ("olmo2", {}, r"parameter q_norm\.weight of shape \(32,\)"),
    ],
)
def test_parameters_of_one_head_each_are_named(name, options, match):
    model = model_of(name, **options)
    with pytest.raises(TypeError, match=match):
        adapt_prune(model, 0.8, batches())
    with pytest.raises(TypeError, match=match):
        prune_units(model, PruningPlan(PLANS["equal"]))
