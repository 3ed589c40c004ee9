"""Figures of the official code (gqk/LAE, in float64), to 1e-10."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import ViTConfig, ViTModel

from hf_stablespam.recipes.lae import (
    CalibratedPrefixConfig,
    LAECallback,
    ParallelAdapterConfig,
    accuracy_per_task,
    add_lae_adapters,
    ensemble_probabilities,
    local_cross_entropy,
)
from hf_stablespam.recipes.lae.adapters import adapter_parameters
from hf_stablespam.recipes.lae.average import update_average

GOLDEN = json.loads((Path(__file__).parents[2] / "data" / "recipes" / "lae_official.json").read_text())
# transformers' eager attention takes the softmax in float32, whatever it is given.
TOLERANCE = {"sdpa": 1e-10, "eager": 5e-5}


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def close(actual, expected, atol=1e-10):
    torch.testing.assert_close(actual, tensor(expected), rtol=1e-6 if atol > 1e-10 else 0, atol=atol)


def config_of(case):
    options = case["options"]
    if case["kind"] == "adapter":
        return ParallelAdapterConfig(down_sample=options["down_sample"], scale=options["scale"])
    if case["kind"] == "lora":
        rank = options["rank"]
        return LoraConfig(r=rank, lora_alpha=rank, target_modules=["k_proj", "v_proj", "key", "value"])
    return CalibratedPrefixConfig(num_virtual_tokens=options["length"], compensate=options["compensatory"])


# The official name of each of our parameters, under the part of our key that tells it.
NAMES = {
    "parallel_adapter_down.weight": "layer.0.weight",
    "parallel_adapter_down.bias": "layer.0.bias",
    "parallel_adapter_up.weight": "layer.2.weight",
    "parallel_adapter_up.bias": "layer.2.bias",
    "parallel_adapter_scale": "layer.3.scale",
    "k_proj.lora_A.weight": "lora_A.0",
    "k_proj.lora_B.weight": "lora_B.0",
    "k_proj.lora_scale": "scale.0.scale",
    "v_proj.lora_A.weight": "lora_A.1",
    "v_proj.lora_B.weight": "lora_B.1",
    "v_proj.lora_scale": "scale.1.scale",
    "calibrated_prefix_key": "key.tokens",
    "calibrated_prefix_value": "val.tokens",
    "calibrated_prefix_key_scale": "key.scaler.scale",
    "calibrated_prefix_value_scale": "val.scaler.scale",
}


def official_name(key):
    return NAMES[next(name for name in sorted(NAMES, key=len, reverse=True) if key.endswith(name))]


def vit_of(dim, num_heads, function="sdpa"):
    config = ViTConfig(
        hidden_size=dim, num_hidden_layers=1, num_attention_heads=num_heads, intermediate_size=dim, image_size=4,
        patch_size=2, attn_implementation=function,
    )  # fmt: skip
    return ViTModel(config, add_pooling_layer=False).double()


@pytest.mark.parametrize("function", ["sdpa", "eager"])
@pytest.mark.parametrize("case", GOLDEN["pet"], ids=lambda case: f"{case['kind']}-{case['options']}")
def test_the_three_methods_in_an_attention(case, function):
    vit = vit_of(case["dim"], case["num_heads"], function)
    attention = vit.layers[0].attention
    weights = {name: tensor(value) for name, value in case["attention"].items()}
    with torch.no_grad():
        for name, rows in zip(("q_proj", "k_proj", "v_proj"), weights["qkv.weight"].chunk(3), strict=True):
            getattr(attention, name).weight.copy_(rows)
        for name, rows in zip(("q_proj", "k_proj", "v_proj"), weights["qkv.bias"].chunk(3), strict=True):
            getattr(attention, name).bias.copy_(rows)
        attention.o_proj.weight.copy_(weights["proj.weight"])
        attention.o_proj.bias.copy_(weights["proj.bias"])
    x = tensor(case["x"])
    close(attention(x)[0], case["attention_output_without_pet"], TOLERANCE[function])

    experts = add_lae_adapters(vit, config_of(case))
    parameters = {official_name(key): value for key, value in adapter_parameters(experts, "default").items()}
    assert parameters.keys() == case["pet"].keys()
    with torch.no_grad():
        for name, value in case["pet"].items():
            parameters[name].copy_(tensor(value))
    output = vit.layers[0].attention(x)[0]
    close(output, case["output"], TOLERANCE[function])
    output.square().sum().backward()
    for name, expected in case["grad_of_sum_of_squares"].items():
        close(parameters[name].grad, expected, TOLERANCE[function])


def test_what_the_methods_start_from():
    configs = (
        ("adapter", ParallelAdapterConfig()),
        ("lora", LoraConfig(r=5, lora_alpha=5, target_modules=["k_proj", "v_proj"])),
        ("prefix", CalibratedPrefixConfig()),
    )
    for kind, config in configs:
        experts = add_lae_adapters(vit_of(16, 2), config)
        parameters = {official_name(k): v.detach() for k, v in adapter_parameters(experts, "default").items()}
        assert {name: list(p.shape) for name, p in parameters.items()} == GOLDEN["init"][f"{kind}_shapes"]
        for name, parameter in parameters.items():
            if name in GOLDEN["init"]["zero_at_init"]:
                assert parameter.eq(0).all()
            elif name in GOLDEN["init"]["one_at_init"]:
                assert parameter.eq(1).all()
            elif kind == "prefix":
                low, high = GOLDEN["init"]["prefix_tokens_range"]
                assert low <= parameter.min() < 0.1 * high
                assert 0.9 * high < parameter.max() <= high
            else:  # Kaiming-uniform with a = sqrt(5): uniform within 1 / sqrt(inputs)
                bound = parameter.shape[1] ** -0.5
                assert 0.9 * bound < parameter.abs().max() <= bound


@pytest.mark.parametrize("case", GOLDEN["local_cross_entropy"], ids=lambda case: f"{case['num_old_classes']} old")
def test_the_loss_is_over_the_new_classes_only(case):
    old, new = case["num_old_classes"], case["num_new_classes"]
    logits = tensor(case["logits"]).requires_grad_()
    outputs = {"logits": logits[:, old:], "classes": torch.arange(old, old + new)}
    loss = local_cross_entropy(outputs, torch.tensor(case["labels"]))
    close(loss, case["loss"])
    loss.backward()
    close(logits.grad, case["grad_logits"])


@pytest.mark.parametrize("case", GOLDEN["ema"], ids=lambda case: str(case["ema_decay"]))
def test_the_average(case):
    offline = {name: tensor(value) for name, value in case["offline_at_start"].items()}
    for step in case["steps"]:
        online = [tensor(step["online"][name]) for name in offline]
        assert update_average(list(offline.values()), online, case["ema_decay"])
        for name, value in offline.items():
            close(value, step["offline"][name])


@pytest.mark.parametrize("case", GOLDEN["freeze_schedule"], ids=lambda case: f"task {case['task']}")
def test_the_epochs_in_which_the_online_expert_learns(case):
    callback = LAECallback(case["task"], num_freeze_epochs=case["num_freeze_epochs"])
    trainable = [not callback.is_frozen(epoch) for epoch in range(case["num_epochs"])]
    assert trainable == case["online_trainable_per_epoch"]


@pytest.mark.parametrize("case", GOLDEN["ensemble"], ids=lambda case: str(case["seed"]))
def test_the_ensemble_and_its_accuracies(case):
    labels, classes = torch.tensor(case["labels"]), case["classes_per_task"]
    online = tensor(case["online_logits"])
    offline = None if case["offline_logits"] is None else tensor(case["offline_logits"])
    assert ensemble_probabilities(online).argmax(-1).tolist() == case["pred_online"]
    if offline is not None:
        assert ensemble_probabilities(offline).argmax(-1).tolist() == case["pred_offline"]
    experts = [offline] if case["eval_only_offline"] else [e for e in (online, offline) if e is not None]
    scores = ensemble_probabilities(*experts)
    assert scores.argmax(-1).tolist() == case["pred_ensemble"]
    close((scores.argmax(-1) == labels).double().mean(), case["accuracy"])
    close(tensor(accuracy_per_task(scores, labels, classes)), case["accuracy_per_task"])
    local = accuracy_per_task(scores, labels, classes, among_own_classes=True)
    close(tensor(local), case["local_accuracy_per_task"])
