"""The cut model is the model with the removed units' weights at zero."""

import copy

import pytest
import torch
from torch import nn

from hf_stablespam.recipes.adapt_pruner import (
    LayerPlan,
    PruningPlan,
    PruningReport,
    adapt_prune,
    group_importance,
    prune_units,
)
from tests.recipes.adapt_pruner.models import FAMILIES, batches, logits, small

PLAN = PruningPlan(
    [LayerPlan((0, 5, 7, 40), (1, 3)), LayerPlan(None, (0,)), LayerPlan(tuple(range(1, 48)), (0, 1, 2, 3))]
)


def zeroed(model, plan):
    """A copy in which every weight of a removed unit is zero; query head i belongs to key-value head i // queries."""
    model = copy.deepcopy(model)
    for layer, kept in zip(model.model.layers, plan.layers, strict=True):
        for neuron in set(range(48)) - set(kept.neurons if kept.neurons is not None else range(48)):
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
                clear(linear, neuron)
            layer.mlp.down_proj.weight.data[:, neuron] = 0
        for head in set(range(4)) - set(kept.kv_heads):
            for channel in range(4 * head, 4 * head + 4):
                for linear in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                    clear(linear, channel)
            for channel in range(8 * head, 8 * head + 8):
                clear(layer.self_attn.q_proj, channel)
                layer.self_attn.o_proj.weight.data[:, channel] = 0
    return model


def clear(linear, row):
    linear.weight.data[row] = 0
    if linear.bias is not None:
        linear.bias.data[row] = 0


@pytest.mark.parametrize("family", FAMILIES)
def test_cutting_is_setting_to_zero(family):
    model = small(family)
    expected = logits(zeroed(model, PLAN))
    report = prune_units(model, PLAN)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    assert report.parameters_after == sum(parameter.numel() for parameter in model.parameters())
    assert report.widths[1] == {"intermediate_size": 48, "kv_heads": 1}
    assert not torch.allclose(expected, logits(small(family)), atol=1e-3)  # the units had mattered


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_model_generates_with_its_cache(family):
    model = small(family)
    prune_units(model, PLAN)
    ids = batches(1)[0]["input_ids"][:2]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(model.generate(ids, use_cache=True, **options), model.generate(ids, use_cache=False, **options))


def test_removing_nothing_changes_nothing():
    model = small()
    before = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    config = model.config.to_dict()
    optimizer = torch.optim.AdamW(model.parameters())
    prune_units(model, PruningPlan([LayerPlan()] * 3), optimizer)
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])
    assert model.config.to_dict() == config


def test_the_new_parameters_train():
    model = small()
    prune_units(model, PLAN)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = batches(1)[0]["input_ids"]
    losses = []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_a_graph_that_lives_does_not_hinder():
    """Autograd keeps the shape of a parameter for as long as a graph has it: a new one is needed, not new data."""
    model = small()
    ids = batches(1)[0]["input_ids"]
    graph = model(input_ids=ids, labels=ids).loss
    prune_units(model, PLAN)
    model(input_ids=ids, labels=ids).loss.backward()
    assert graph.grad_fn is not None
    assert model.model.layers[0].mlp.gate_proj.weight.grad.shape == (4, 32)


def test_sizes_that_modules_keep():
    model = small()
    prune_units(model, PLAN)
    layer = model.model.layers[0]
    assert layer.mlp.intermediate_size == 4
    assert (layer.mlp.down_proj.in_features, layer.mlp.gate_proj.out_features) == (4, 4)
    assert (layer.self_attn.q_proj.out_features, layer.self_attn.o_proj.in_features) == (16, 16)


def test_layers_that_share_their_parameters_are_cut_once():
    """As MobileLLM-LS has them: two layers in a row with the same weights."""
    model = small()
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        setattr(model.model.layers[1].self_attn, name, getattr(model.model.layers[0].self_attn, name))
    for name in ("gate_proj", "up_proj", "down_proj"):
        getattr(model.model.layers[1].mlp, name).weight = getattr(model.model.layers[0].mlp, name).weight
        getattr(model.model.layers[1].mlp, name).bias = getattr(model.model.layers[0].mlp, name).bias
    report = adapt_prune(model, 0.7, batches(), show_progress=False)
    assert report.reached
    first, second = model.model.layers[:2]
    assert first.mlp.down_proj.weight is second.mlp.down_proj.weight
    assert report.kept.layers[0] == report.kept.layers[1]
    assert second.mlp.down_proj.in_features == report.widths[0]["intermediate_size"]
    assert report.parameters_after == sum(parameter.numel() for parameter in model.parameters())


def test_tied_gate_and_up_are_cut_and_counted_once():
    model = small()
    for layer in model.model.layers:
        layer.mlp.up_proj.weight = layer.mlp.gate_proj.weight
    expected = logits(zeroed(model, PLAN))
    prune_units(model, PLAN)
    assert model.model.layers[0].mlp.up_proj.weight is model.model.layers[0].mlp.gate_proj.weight
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    report = adapt_prune(model, 0.95, batches(), show_progress=False)
    assert report.target_parameters - (2 * 32 + 1) < report.parameters_after <= report.target_parameters


def test_scores_are_those_of_a_slow_loop():
    model = small("qwen2")
    ids = batches(1)[0]["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    layer, scores = model.model.layers[1], group_importance(model)[1]

    def product(tensor, index):
        return (tensor[index] * tensor.grad[index]).abs().sum().item()

    attention = layer.self_attn
    for head in range(4):
        rows, queries = slice(4 * head, 4 * head + 4), slice(8 * head, 8 * head + 8)
        score = sum(product(linear.weight, rows) for linear in (attention.k_proj, attention.v_proj))
        score += sum(product(linear.bias, rows) for linear in (attention.k_proj, attention.v_proj))
        score += product(attention.q_proj.weight, queries) + product(attention.q_proj.bias, queries)
        score += product(attention.o_proj.weight, (slice(None), queries))
        assert float(scores.kv_heads[head]) == pytest.approx(score, rel=1e-4)
    mlp = layer.mlp
    score = sum(product(linear.weight, 7) for linear in (mlp.gate_proj, mlp.up_proj))
    assert float(scores.neurons[7]) == pytest.approx(score + product(mlp.down_proj.weight, (slice(None), 7)), rel=1e-4)


def test_a_report_is_json():
    report = adapt_prune(small(), 0.8, batches(), show_progress=False)
    assert PruningReport.from_json(report.to_json()) == report


def test_buffers_of_other_modules_are_no_obstacle():
    model = small()
    model.extra = nn.Linear(3, 3)  # what is no decoder layer stays as it is
    prune_units(model, PLAN)
    assert model.extra.weight.shape == (3, 3)
