"""The optimizer after the surgery: of new parameters, with the state of what is left of the old."""

import copy

import pytest
import torch

from hf_stablespam import SPAM, StableSPAM, stabilize
from hf_stablespam.recipes.adapt_pruner import LayerPlan, PruningPlan, prune_units
from tests.recipes.adapt_pruner.models import batches, small
from tests.recipes.adapt_pruner.test_surgery import PLAN

OPTIMIZERS = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2, amsgrad=True),
    "stable_spam": lambda params: StableSPAM(params, lr=1e-2, reset_interval=5),
    "spam": lambda params: SPAM(params, lr=1e-2),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=1e-2),  # has a state before its first step
    "sgd": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9),
}


def train(model, optimizer, steps=3):
    ids = batches(1)[0]["input_ids"]
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def trained(name, model=None):
    model = small() if model is None else model
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer)
    return model, optimizer


@pytest.mark.parametrize("choice", ["reset", "keep"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_groups_hold_the_models_parameters(name, choice):
    model, optimizer = trained(name)
    prune_units(model, PLAN, optimizer, optimizer_state=choice)
    own = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert own == [id(parameter) for parameter in model.parameters()]
    assert {id(parameter) for parameter in optimizer.state} <= set(own)
    before = [parameter.clone() for parameter in model.parameters()]
    train(model, optimizer)
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("choice", ["reset", "keep"])
def test_trackers_of_stabilize_go_the_way_of_the_state(choice):
    """Of what is cut "reset" drops them, as Stable-SPAM's, and "keep" scales them; of the rest they stay."""
    model = small()
    optimizer = stabilize(torch.optim.AdamW(model.parameters(), lr=1e-2))
    train(model, optimizer)
    loaded = stabilize(torch.optim.AdamW(model.parameters(), lr=1e-2))
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # its trackers lie in the state until its first step
    old = {name: (param.numel(), loaded.stabilizer.trackers()[param]) for name, param in model.named_parameters()}
    twin = stabilize(torch.optim.AdamW(model.parameters(), lr=1e-2))
    twin.load_state_dict(optimizer.state_dict())
    prune_units(model, PLAN, twin, optimizer_state=choice)
    cut = 0
    for name, param in model.named_parameters():
        count, before = old[name]
        after = twin.stabilizer.trackers().get(param)
        share, cut = param.numel() / count, cut + (param.numel() < count)
        if choice == "reset" and share < 1:
            assert after is None
            continue
        expected = {"norm_mean": before["norm_mean"] * share**0.5, "norm_sq": before["norm_sq"] * share}
        for key, value in {**before, **expected}.items():
            assert torch.equal(after[key], value), (name, key)
    assert cut
    assert len(twin.stabilizer.trackers()) <= len(old)


@pytest.mark.parametrize("name", ["adamw", "stable_spam"])
def test_keep_equals_an_optimizer_that_was_made_on_the_small_model(name):
    """Loaded with the same state, its tensors indexed by hand, it makes the same steps, bit for bit."""
    model, optimizer = trained(name)
    names = [name for name, _ in model.named_parameters()]
    shapes = [parameter.shape for parameter in model.parameters()]
    saved = copy.deepcopy(optimizer.state_dict())
    prune_units(model, PLAN, optimizer, optimizer_state="keep")

    twin = copy.deepcopy(model)
    other = OPTIMIZERS[name](twin.parameters())
    for index, parameter in enumerate(names):
        for key, value in saved["state"][index].items():
            if value.shape == shapes[index]:
                saved["state"][index][key] = indexed(parameter, value)
        share = twin.get_parameter(parameter).numel() / shapes[index].numel()
        for key, power in (("norm_mean", 0.5), ("norm_sq", 1)):
            if key in saved["state"][index]:
                saved["state"][index][key] *= share**power
    other.load_state_dict(saved)
    for one, two in ((model, optimizer), (twin, other)):
        train(one, two, steps=4)  # over a reset of the moments
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, two)


def indexed(name, value):
    """What is left of a tensor of the shape of the parameter `name`."""
    if ".layers." not in name or "norm" in name:
        return value
    kept = PLAN.layers[int(name.split(".")[2])]
    neurons = list(range(48)) if kept.neurons is None else list(kept.neurons)
    keys = [4 * head + i for head in kept.kv_heads for i in range(4)]
    queries = [8 * head + i for head in kept.kv_heads for i in range(8)]
    *_, linear, kind = name.split(".")
    if kind == "bias" and linear in ("o_proj", "down_proj"):
        return value
    rows = {"gate_proj": neurons, "up_proj": neurons, "q_proj": queries, "k_proj": keys, "v_proj": keys}
    columns = {"down_proj": neurons, "o_proj": queries}
    return value[rows[linear]] if linear in rows else value[:, columns[linear]]


def test_keep_with_nothing_removed_changes_nothing():
    model, optimizer = trained("stable_spam")
    twin = copy.deepcopy(model)
    other = OPTIMIZERS["stable_spam"](twin.parameters())
    other.load_state_dict(optimizer.state_dict())
    prune_units(model, PruningPlan([LayerPlan()] * 3), optimizer, optimizer_state="keep")
    for one, two in ((model, optimizer), (twin, other)):
        train(one, two)
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, two)


def test_reset_leaves_the_trackers_of_what_was_not_cut():
    model, optimizer = trained("stable_spam")
    embedding = model.model.embed_tokens.weight
    tracked = optimizer.state[embedding]["clip_max"].clone()
    prune_units(model, PLAN, optimizer)
    assert torch.equal(optimizer.state[embedding]["clip_max"], tracked)
    assert not optimizer.state[embedding]["exp_avg"].any()
    assert model.model.layers[0].mlp.up_proj.weight not in optimizer.state


def test_states_that_cannot_be_indexed_are_reset_and_named():
    model = small(hidden_size=128, intermediate_size=128)
    optimizer = StableSPAM(model.parameters(), lr=1e-2, state_bits=8)
    train(model, optimizer, 1)
    plan = PruningPlan([LayerPlan(tuple(range(64)), None)] * 3)
    report = prune_units(model, plan, optimizer, optimizer_state="keep")
    assert "model.layers.0.mlp.up_proj.weight" in report.reset
    assert "model.layers.0.mlp.up_proj.bias" not in report.reset  # too small for 8 bits: kept
    assert model.model.layers[0].mlp.up_proj.weight not in optimizer.state
    train(model, optimizer, 1)


def test_a_layerwise_optimizer_is_refused():
    model = small()
    model.model.layers[2].mlp.up_proj.weight.register_post_accumulate_grad_hook(lambda parameter: None)
    before = dict(model.named_parameters())
    with pytest.raises(ValueError, match="has gradient hooks, as layer-wise optimizers put on it"):
        prune_units(model, PLAN)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


class Projector:
    def __init__(self, matrix):
        self.matrix = matrix


@pytest.mark.parametrize("made", [lambda m: [m], lambda m: {"left": (m,)}, Projector])
def test_tensors_inside_of_lists_and_objects_are_reset_and_named(made):
    model, optimizer = trained("adamw")
    weights = [layer.mlp.up_proj.weight for layer in model.model.layers]
    optimizer.state[weights[0]]["preconditioner"] = made(torch.eye(48))
    optimizer.state[weights[1]]["hyperparameters"] = [0.9, torch.tensor(1.0)]
    report = prune_units(model, PLAN, optimizer, optimizer_state="keep")
    assert report.reset == ("model.layers.0.mlp.up_proj.weight",)
    assert model.model.layers[0].mlp.up_proj.weight not in optimizer.state
    assert "hyperparameters" in optimizer.state[model.model.layers[1].mlp.up_proj.weight]
