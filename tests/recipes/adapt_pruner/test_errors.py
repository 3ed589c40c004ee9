"""Bad input is an error before anything has changed; the message names field, rule, value and remedy."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from hf_stablespam.recipes.adapt_pruner import (
    AdaptPruneCallback,
    LayerPlan,
    PruningPlan,
    adapt_prune,
    adaptive_sparsity,
    group_importance,
    layer_importance,
    prune_and_train,
    prune_units,
    split_data,
)
from tests.recipes.adapt_pruner.models import SHAPE, batches, small
from tests.trainer.helpers import RandomTokens, tiny_trainer

TINY = {key: value for key, value in SHAPE.items() if key != "head_dim"}


def unchanged(model, call, error, match):
    """The call raises, and the model is as it was."""
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=match):
        call(model)
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"steps": 0}, r"steps must be an integer of at least 1, got 0; 50 is the published one"),
        ({"amplitude": -0.1}, r"amplitude must be at least 0, got -0.1; 0.02 is"),
        ({"ratio": 0}, r"ratio must be above 0, got 0"),
        ({"multiple_of": 0}, r"multiple_of must be an integer of at least 1, got 0"),
        (
            {"multiple_of": 5},
            r"multiple_of must divide the 32 inputs of model.layers.0.self_attn.o_proj .* got 5; use 1",
        ),
        ({"keep_layers": [3]}, r"keep_layers must hold layer indices from -3 to 2, got 3"),
        ({"equal_widths": True, "keep_layers": [0]}, r"equal_widths=True cuts all layers alike, got keep_layers=\[0\]"),
        ({"optimizer_state": "half"}, r"optimizer_state must be 'reset' or 'keep', got 'half'"),
        ({"target": 0}, r"target_parameters must be a number of parameters, or a share as a float, got 0"),
        ({"target": True}, r"target_parameters must be a number"),
        ({"target": 0.1}, r"target_parameters must be at least \d+, which is left with one unit .* got 2803"),
        ({"calibration": []}, r"calibration must yield at least one batch, got none"),
        ({"calibration": [{"labels": torch.zeros(1, 4)}]}, r"must have input_ids, got the keys \['labels'\]"),
        (
            {"calibration": [{"input_ids": torch.ones(1, 4).long(), "labels": torch.full((1, 4), -100)}]},
            r"the loss of the calibration must be finite, got nan in batch 0",
        ),
    ],
)
def test_options(options, match):
    options = dict(options)
    target, calibration = options.pop("target", 0.8), options.pop("calibration", batches())
    call = lambda model: adapt_prune(model, target, calibration, show_progress=False, **options)  # noqa: E731
    unchanged(small(), call, ValueError, match)


def test_the_floor_is_what_the_message_says():
    model = small()
    with pytest.raises(ValueError, match="at least") as error:
        adapt_prune(model, 100, batches())
    floor = int(str(error.value).split("at least ")[1].split(",")[0])
    prune_units(model, PruningPlan([LayerPlan((0,), (0,))] * 3))
    assert sum(parameter.numel() for parameter in model.parameters()) == floor


@pytest.mark.parametrize("target", [1.0, 28032, 10**9])
def test_a_target_that_is_met_already_is_a_warning(target, caplog):
    model = small()
    before = dict(model.named_parameters())
    report = adapt_prune(model, target, batches())
    assert "not above the target" in caplog.text
    assert report.parameters_after == report.parameters_before == 28032
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (lambda: GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=64)), "found GPT2Block"),
        (lambda: BertForMaskedLM(BertConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1)), "BertLayer"),
        (lambda: Phi3ForCausalLM(Phi3Config(**TINY, pad_token_id=0)), "found Phi3DecoderLayer"),
        (lambda: MixtralForCausalLM(MixtralConfig(**TINY, num_local_experts=2)), "MixtralDecoderLayer"),
        (
            lambda: Qwen2MoeForCausalLM(Qwen2MoeConfig(**TINY, num_experts=2, moe_intermediate_size=8)),
            "Qwen2MoeSparseMoeBlock of Qwen2MoeDecoderLayer has experts",
        ),
        (lambda: nn.Linear(2, 2), "Linear has no decoder layers .* it has no list of layers"),
    ],
    ids=["gpt2", "bert", "phi3", "mixtral", "qwen2moe", "linear"],
)
def test_models_of_another_shape_are_named(model, match):
    with pytest.raises(TypeError, match=match):
        adapt_prune(model(), 0.8, batches())


def test_a_mixture_of_dense_layers_and_experts_is_named():
    model = small()
    model.model.layers[1].mlp = nn.Identity()
    with pytest.raises(TypeError, match=r"layer model.layers.1 cannot be pruned: found LlamaDecoderLayer"):
        adapt_prune(model, 0.8, batches())


def test_parameters_that_no_rule_cuts_are_named():
    model = small()
    model.model.layers[0].self_attn.sinks = nn.Parameter(torch.zeros(8))
    with pytest.raises(TypeError, match=r"LlamaAttention has a parameter sinks of shape \(8,\)"):
        adapt_prune(model, 0.8, batches())


def test_weights_that_cannot_be_scored():
    model = small()
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    call = lambda model: adapt_prune(model, 0.8, batches())  # noqa: E731
    unchanged(model, call, ValueError, r"model.layers.1.mlp.up_proj is frozen \(requires_grad=False\).*keep_layers")
    assert adapt_prune(model, 0.9, batches(), keep_layers=[1], show_progress=False).reached
    unchanged(small().half(), call, ValueError, "float16, whose gradients underflow")
    quantized = small()
    for layer in quantized.model.layers:
        layer.mlp.up_proj.weight = nn.Parameter(torch.zeros(48, 32, dtype=torch.int8), requires_grad=False)
    unchanged(quantized, call, ValueError, "Linear of torch.int8: it is quantized already; prune before quantizing")
    adapted = get_peft_model(small(), LoraConfig(target_modules=["q_proj"], r=2))
    unchanged(adapted, call, ValueError, r"merge the adapter first: model = model.merge_and_unload\(\)")
    unchanged(adapted.base_model.model, call, ValueError, "merge the adapter first")
    with pytest.raises(ValueError, match="merge the adapter first"):
        prune_units(adapted, PruningPlan([LayerPlan((0,), (0,))] * 3))


def test_compiled_and_partly_shared_models():
    with pytest.raises(ValueError, match=r"compiled for its present widths; prune it before torch.compile"):
        adapt_prune(torch.compile(small()), 0.8, batches())
    model = small()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(ValueError, match="layers 0 and 1 share a part of their weights"):
        adapt_prune(model, 0.8, batches())


@pytest.mark.parametrize(
    ("layers", "match"),
    [
        ([LayerPlan()] * 2, "one entry per layer, got 2 for 3 layers"),
        ([LayerPlan((1, 0))] * 3, r"neurons of model.layers.0 must be ascending indices, at least one, got \[1, 0\]"),
        ([LayerPlan(kv_heads=())] * 3, "kv_heads of model.layers.0 must be ascending indices, at least one"),
        ([LayerPlan(), LayerPlan((0, 48)), LayerPlan()], r"neurons of model.layers.1 must be below the 48"),
        ([LayerPlan((-1, 3))] * 3, "must be below the 48"),
    ],
)
def test_plans_that_do_not_fit(layers, match):
    unchanged(small(), lambda model: prune_units(model, PruningPlan(layers)), ValueError, match)


def test_scores_without_gradients_and_other_metrics():
    with pytest.raises(ValueError, match=r"without a gradient, which the score needs; call loss.backward\(\) first"):
        group_importance(small())
    with pytest.raises(ValueError, match="metric must be 'cosine', got 'euclidean'"):
        layer_importance(small(), batches(), metric="euclidean")
    with pytest.raises(ValueError, match="at least one batch"):
        layer_importance(small(), [])
    with pytest.raises(TypeError, match=r"one dictionary; write \[batch\]"):
        layer_importance(small(), batches()[0])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"amplitude": -1}, "amplitude must be at least 0, got -1"),
        ({"maximum": 2}, r"maximum must be in \[0, 1\], got 2"),
        ({"importance": [0.0]}, "one entry per layer, got 2 and 1"),
    ],
)
def test_sparsity(options, match):
    with pytest.raises(ValueError, match=match):
        adaptive_sparsity(**{"previous": [0.0, 0.0], "importance": [0.0, 1.0], "step_size": 0.02, **options})


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "give either at_steps or stages, got at_steps=None and stages=None"),
        ({"at_steps": [1], "stages": 2}, "give either at_steps or stages"),
        ({"at_steps": []}, r"at_steps must be ascending steps from 0, at least one, got \[\]"),
        ({"at_steps": [5, 5]}, "at_steps must be ascending"),
        ({"at_steps": 5}, "at_steps must be ascending"),
        ({"stages": 0}, "stages must be an integer of at least 1, got 0"),
        (
            {"stages": 2, "data_split": "square"},
            "data_split must be one of 'linear', .*, got 'square'",
        ),
        ({"stages": 2, "amplitude": -1}, "amplitude must be at least 0"),
        ({"stages": 2, "optimizer_state": "half"}, "optimizer_state must be 'reset' or 'keep'"),
    ],
)
def test_arguments_of_the_callback(options, match):
    with pytest.raises(ValueError, match=match):
        AdaptPruneCallback(0.5, **options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"},
            "does not fit the model",
        ),
        ({"torch_compile": True}, "torch_compile=True does not go with AdaptPruneCallback"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True does not go with AdaptPruneCallback: .* cut again"),
    ],
)
def test_arguments_of_the_trainer(options, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        tiny_trainer(tmp_path, callbacks=[AdaptPruneCallback(0.5, stages=2)], **options)


def test_what_is_known_when_training_begins(tmp_path):
    for callback, match in (
        (AdaptPruneCallback(0.5, at_steps=[7]), "at_steps must be at most the 6 steps of the run, got 7"),
        (AdaptPruneCallback(10, at_steps=[3]), "target_parameters must be at least"),
    ):
        trainer = tiny_trainer(tmp_path, callbacks=[callback])
        with pytest.raises(ValueError, match=match):
            trainer.train()
        assert trainer.state.global_step == 0
    trainer = tiny_trainer(tmp_path, callbacks=[AdaptPruneCallback(0.9, at_steps=[3])])
    trainer.train_dataset = Endless()
    with pytest.raises(ValueError, match=r"no calibration samples can be drawn; pass calibration=\[...\]"):
        trainer.train()


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from RandomTokens()


def test_stages_without_what_they_need(tmp_path):
    def trainer(model, stage):
        return tiny_trainer(tmp_path, model=model)

    for options, match in (
        ({"stages": 0}, "stages must be an integer of at least 1"),
        ({"stages": 2, "data_split": "x"}, "data_split must be one of"),
        (
            {"stages": 2, "first_stage": 1},
            "got 1; above 0 it needs original_parameters",
        ),
        ({"stages": 12}, r"64 is too little for 12 stages \(linear\)"),
    ):
        unchanged(small(), lambda model, o=options: prune_and_train(model, trainer, 0.8, **o), ValueError, match)
    with pytest.raises(ValueError, match="100 is too little for 200 stages"):
        split_data(100, 200, "constant")
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}
    unchanged(
        small(),
        lambda model: prune_and_train(
            *(model, lambda model, stage: tiny_trainer(tmp_path, model=model, **plateau), 0.9),
            stages=1,
            calibration=batches(),
        ),
        ValueError,
        "whose rate follows from the step alone, got ReduceLROnPlateau",
    )
