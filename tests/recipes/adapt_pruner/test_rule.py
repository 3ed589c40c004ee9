"""The rule as numbers: shares of the layers, units of a step, the trimming of the last one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_stablespam.recipes.adapt_pruner import adapt_prune, adaptive_sparsity
from hf_stablespam.recipes.adapt_pruner.selection import Supply, bundles, lowest, parameters_of, to_remove, trimmed
from tests.recipes.adapt_pruner.models import batches, small

importances = st.lists(st.floats(-1, 1).map(lambda value: round(value, 9)), min_size=2, max_size=8)


@given(importances)
def test_the_normalised_importance_has_mean_zero_and_largest_one(values):
    normalised = (0.5 - adaptive_sparsity([0.5] * len(values), values, step_size=0.0, amplitude=0.25)) / 0.25
    assert normalised.sum() == pytest.approx(0, abs=1e-9)
    equal = max(values) - min(values) <= 1e-11 * max(map(abs, values))
    assert normalised.abs().max() == pytest.approx(0 if equal else 1)


def test_amplitude_zero_and_equal_importances_give_equal_shares():
    assert torch.equal(
        adaptive_sparsity([0.1, 0.1], [-0.3, -0.9], step_size=0.02, amplitude=0.0),
        adaptive_sparsity([0.1, 0.1], [-0.1, -0.1], step_size=0.02, amplitude=0.5),
    )


def test_rounding_of_a_mean_is_no_difference():
    shares = adaptive_sparsity([0.0] * 3, [0.1] * 3, step_size=0.02)  # the mean of three 0.1 is not 0.1
    assert torch.equal(shares, torch.full((3,), 0.02, dtype=torch.float64))


def test_shares_stay_in_their_bounds():
    shares = adaptive_sparsity([0.0, 0.98], [0.0, -1.0], step_size=0.02, amplitude=0.05)
    assert shares.tolist() == [0.0, 0.99]


def supply(scores, *, initial=None, channels=1, multiple=1, kind="neurons", layer=0, cost=3):
    return Supply(layer, kind, tuple(scores), initial or len(scores) * channels, channels, multiple, cost)


@pytest.mark.parametrize(
    ("initial", "present", "channels", "multiple", "share", "removed"),
    [
        (48, 48, 1, 1, 0.1, 5),  # ⌊48 · 0.9⌋ = 43 stay
        (48, 40, 1, 1, 0.1, 0),  # more are gone already
        (48, 48, 1, 16, 0.1, 0),  # 43 is rounded up to 48
        (48, 48, 1, 16, 0.4, 16),  # 28 to 32
        (41, 41, 1, 16, 0.5, 9),  # 20 to 32; 41 was no multiple
        (41, 41, 1, 64, 0.5, 0),
        (16, 2, 8, 1, 0.4, 0),  # 7 of 16 channels are no whole head
        (16, 2, 8, 1, 0.5, 1),
        (16, 1, 8, 1, 0.99, None),  # the last one stays
        (48, 1, 1, 1, 0.99, None),
    ],
)
def test_units_of_a_step(initial, present, channels, multiple, share, removed):
    found = to_remove(supply([1.0] * present, initial=initial, channels=channels, multiple=multiple), share)
    assert found == removed


def test_the_lowest_go_first_and_in_multiples():
    chunks = lowest(supply([5.0, 1.0, 4.0, 2.0, 3.0], multiple=2), 3)
    assert [chunk.units for chunk in chunks] == [(1,), (3, 4)]


@settings(max_examples=200)
@given(
    st.lists(st.lists(st.floats(0, 10), min_size=1, max_size=6), min_size=1, max_size=3),
    st.lists(st.floats(0, 10), min_size=1, max_size=4),
    st.integers(1, 60),
)
def test_trimming_removes_what_is_needed_and_less_than_a_neuron_more(neurons, heads, excess):
    own = [lowest(supply(scores, layer=layer), len(scores)) for layer, scores in enumerate(neurons)]
    own.append(lowest(supply(heads, kind="kv_heads", cost=16), len(heads)))
    candidates = bundles(own, equal_widths=False)
    taken = trimmed(candidates, excess)
    removed, most = sum(map(parameters_of, taken)), sum(map(parameters_of, candidates))
    assert removed >= min(excess, most)
    if most >= excess and any(bundle[0].supply.kind == "neurons" for bundle in taken):
        assert removed - excess < 3
    if any(bundle[0].supply.kind == "kv_heads" for bundle in taken):
        assert excess > 3 * sum(map(len, neurons))  # heads only where the neurons were not enough


@pytest.mark.parametrize("target", [0.95, 0.7, 0.55])
def test_the_target_is_met_to_a_neuron(target):
    model = small()
    report = adapt_prune(model, target, batches(), show_progress=False)
    neuron = 3 * 32 + 2
    assert report.target_parameters - neuron < report.parameters_after <= report.target_parameters
    assert report.parameters_after == sum(parameter.numel() for parameter in model.parameters())


def test_kept_indices_are_sorted_and_nested():
    report = adapt_prune(small(), 0.6, batches(), show_progress=False)
    gone = [set() for _ in report.kept.layers]
    for step in report.steps:
        for layer, removed in enumerate(step.removed):
            assert not gone[layer] & set(removed.neurons)  # nothing goes twice
            gone[layer] |= set(removed.neurons)
    for layer, kept in enumerate(report.kept.layers):
        assert list(kept.neurons) == sorted(set(range(48)) - gone[layer])


def test_layers_that_change_little_lose_more():
    model = small()
    for layer, factor in zip(model.model.layers, (1.0, 0.05, 1.0), strict=True):
        layer.mlp.down_proj.weight.data *= factor
        layer.self_attn.o_proj.weight.data *= factor
    widths = [one["intermediate_size"] for one in adapt_prune(model, 0.8, batches(), show_progress=False).widths]
    assert widths[1] < min(widths[0], widths[2])
    flat = adapt_prune(small(), 0.8, batches(), amplitude=0.0, show_progress=False)
    assert max(flat.sparsity) == min(flat.sparsity)


def test_a_layer_keeps_its_last_unit_and_the_report_counts_it():
    report = adapt_prune(small(), 0.45, batches(), steps=2, show_progress=False)  # the second step asks for 98 %
    assert report.refused > 0
    assert all(one["intermediate_size"] >= 1 and one["kv_heads"] >= 1 for one in report.widths)


def test_too_few_steps_are_said_and_not_hidden(caplog):
    """With A = R/steps the most important layer loses nothing, however many steps there are."""
    report = adapt_prune(small(), 0.5, batches(), show_progress=False)
    assert not report.reached
    assert max(report.widths, key=lambda one: one["intermediate_size"])["intermediate_size"] == 48
    assert "above the target of 14016; use a smaller amplitude (0.02)" in caplog.text
    assert adapt_prune(small(), 0.5, batches(), amplitude=0.01, show_progress=False).reached


def test_kept_layers_and_whole_attention():
    report = adapt_prune(small(), 0.8, batches(), amplitude=0.01, keep_layers=[-2], prune_attention=False)
    assert report.widths[1] == {"intermediate_size": 48, "kv_heads": 4}
    assert all(one["kv_heads"] == 4 for one in report.widths)
    assert report.widths[0]["intermediate_size"] < 48
    assert report.reached


def test_equal_widths_are_those_of_the_config():
    model = small()
    report = adapt_prune(model, 0.6, batches(), equal_widths=True, show_progress=False)
    assert report.reached
    assert len({tuple(one.items()) for one in report.widths}) == 1
    config = model.config
    assert config.intermediate_size == report.widths[0]["intermediate_size"]
    assert (config.num_key_value_heads, config.head_dim) == (report.widths[0]["kv_heads"], 4)
    assert config.num_attention_heads == 2 * config.num_key_value_heads


def test_multiples_are_kept():
    report = adapt_prune(small(), 0.7, batches(), multiple_of=16, show_progress=False)
    for one in report.widths:
        assert one["intermediate_size"] % 16 == 0
        assert one["kv_heads"] % 2 == 0  # two heads of two queries of four channels
    assert report.reached


def test_everything_else_is_left_as_it_was():
    """Modes, random numbers and what requires a gradient."""
    model = small().train()
    model.model.layers[1].eval()
    model.lm_head.weight.requires_grad_(False)
    state = torch.get_rng_state()
    adapt_prune(model, 0.9, batches(), show_progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not model.model.layers[1].training
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_fresh_batches_are_drawn_by_the_seed():
    data = [{"input_ids": row} for batch in batches(4) for row in batch["input_ids"]]

    def kept(seed):
        loader = torch.utils.data.DataLoader(data, batch_size=3, shuffle=True)
        torch.manual_seed(int(torch.randint(1000, ())))  # whatever the global generator holds
        return adapt_prune(small(), 0.8, loader, seed=seed, show_progress=False)

    assert kept(1) == kept(1)


def test_an_iterator_serves_all_steps():
    once = adapt_prune(small(), 0.8, iter(batches()), show_progress=False)
    assert once == adapt_prune(small(), 0.8, batches(), show_progress=False)


def test_padding_changes_nothing():
    padded = []
    for batch in batches():
        rows = len(batch["input_ids"])
        ids = torch.cat([batch["input_ids"], torch.full((rows, 5), 7)], dim=1)
        mask = torch.cat([torch.ones_like(batch["input_ids"]), torch.zeros(rows, 5, dtype=torch.int64)], dim=1)
        padded.append({"input_ids": ids, "attention_mask": mask})
    plain = adapt_prune(small(), 0.8, batches(), show_progress=False)
    other = adapt_prune(small(), 0.8, padded, show_progress=False)
    assert other.kept == plain.kept
    assert other.steps[0].importance == pytest.approx(plain.steps[0].importance, abs=1e-5)
