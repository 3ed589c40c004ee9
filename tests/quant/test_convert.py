"""Conversion in place and back."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from hf_stablespam.quant import FourBitConfig, FourBitLinear, convert_to_4bit, restore_linear


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 8), nn.ReLU())


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 8)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.conv = nn.Conv1d(8, 8, 3)
        self.lm_head = nn.Linear(8, 4)


def names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, FourBitLinear)}


def test_parameters_their_identity_and_keys_stay() -> None:
    model = Model()
    before = dict(model.named_parameters())
    assert convert_to_4bit(model) is model
    assert len(names(model)) == 12
    assert type(model.lm_head) is nn.Linear
    after = dict(model.named_parameters())
    assert list(before) == list(after)
    assert all(before[key] is after[key] for key in before)


def test_restoring_gives_back_plain_layers_and_leaves_no_trace() -> None:
    model = Model()
    attributes = set(vars(model.layers[0].q_proj))
    restore_linear(convert_to_4bit(model))
    assert names(model) == set()
    assert type(model.layers[0].q_proj) is nn.Linear
    assert set(vars(model.layers[0].q_proj)) == attributes
    assert model.layers[0].q_proj(torch.ones(1, 8)).shape == (1, 8)


def test_restoring_a_part_leaves_the_rest_a_scale_of_its_own() -> None:
    model = convert_to_4bit(Model(), FourBitConfig.nvfp4())
    block, x = model.layers[0], torch.ones(1, 8)
    with torch.no_grad():
        block.q_proj.weight[0, 0] = 9.0
    restore_linear(block.q_proj)
    assert block.k_proj.scale_partners == block.v_proj.scale_partners == (block.k_proj, block.v_proj)
    assert block.k_proj.shared_amax() < 9.0
    restore_linear(block.k_proj)
    assert block.v_proj.scale_partners == ()
    assert all(layer(x).isfinite().all() for layer in (block.q_proj, block.k_proj, block.v_proj))
    convert_to_4bit(model, FourBitConfig.nvfp4())
    assert block.v_proj.scale_partners == (block.q_proj, block.k_proj, block.v_proj)


def test_a_class_that_came_after_the_conversion_is_not_dropped() -> None:
    model, x = convert_to_4bit(Model()), torch.ones(1, 8)
    layer = model.layers[0].q_proj
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    before = layer(x)
    message = (
        r"'layers.0.q_proj' must be a FourBitLinear to be restored, got ParametrizedFourBitLinear.*; take it away first"
    )
    with pytest.raises(ValueError, match=message):
        restore_linear(model)
    assert len(names(model)) == 12  # nothing is restored halfway
    assert torch.equal(layer(x), before)
    parametrize.remove_parametrizations(layer, "weight")
    assert names(restore_linear(model)) == set()
    assert layer(x).shape == (1, 8)


def test_converting_twice_is_harmless_and_another_configuration_is_refused() -> None:
    model = convert_to_4bit(Model())
    layer = model.layers[0].q_proj
    layer(torch.ones(1, 8))
    kept = layer._kept
    convert_to_4bit(model)
    assert layer._kept is kept
    with pytest.raises(
        ValueError, match=r"'layers.0.q_proj' is already converted .* call restore_linear\(model\) first"
    ):
        convert_to_4bit(model, FourBitConfig(group_size=64))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"modules_to_not_convert": ("lm_head", "q_proj")}, 9),
        ({"modules_to_not_convert": (r".*\.mlp\..*", "lm_head")}, 9),
        ({"modules_to_not_convert": ()}, 12),  # a head must be named
        ({"modules_to_not_convert": (), "target_modules": ".*"}, 12),
        ({"modules_to_not_convert": (), "target_modules": (".*", "lm_head")}, 13),
        ({"modules_to_not_convert": ("layers.1", "mlp")}, 6),  # what holds layers
        ({"modules_to_not_convert": "layers.1", "target_modules": ("q_proj", "layers.1.mlp.0")}, 2),
        ({"modules_to_not_convert": r"(?!.*q_proj).*"}, 3),  # a regular expression is for layers alone
        ({"target_modules": (".*", "lm_head")}, 12),  # what is not to be converted is not
        ({"target_modules": ("q_proj", "v_proj")}, 6),
        ({"target_modules": (r"layers\.[01]\..*",)}, 8),
        ({"target_modules": "q_proj"}, 3),
        ({"keep_last_blocks": 1}, 8),
        ({"keep_last_blocks": 2, "target_modules": ("mlp.0",)}, 1),
    ],
)
def test_which_layers_are_converted(options: dict, expected: int) -> None:
    assert len(names(convert_to_4bit(Model(), FourBitConfig(**options)))) == expected


def test_one_line_says_what_was_converted_and_what_was_left(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="hf_stablespam"):
        convert_to_4bit(Model(), FourBitConfig(modules_to_not_convert=("lm_head", "mlp.0")))
        convert_to_4bit(model := convert_to_4bit(Model()))
    assert len(caplog.records) == 2
    line = caplog.records[0].getMessage()
    assert "converted 9 linear layers (weight int4, activation int4, gradient None)" in line
    assert "left alone: layers.*.mlp.* (Linear) ×3, conv (Conv1d), lm_head (Linear)" in line
    assert model is not None


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (nn.Sequential(nn.ReLU()), {}, "the model has no nn.Linear; it has no weight matrix at all"),
        (
            nn.Sequential(nn.Conv1d(2, 2, 1)),
            {},
            r"the model has no nn.Linear; other kinds of layers are not supported: .* \(Conv1d\)",
        ),
        (
            nn.Sequential(nn.Linear(2, 2)),
            {"target_modules": ("x",)},
            r"nn.Linear layers: 1, all excluded by target_modules=\('x',\)",
        ),
    ],
)
def test_a_model_without_a_layer_to_convert_is_refused(model: nn.Module, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"no layer to convert to 4 bits: .*({message})"):
        convert_to_4bit(model, FourBitConfig(**options))


@pytest.mark.parametrize("field", ["target_modules", "modules_to_not_convert"])
def test_a_name_that_nothing_has_is_warned_about(field: str, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.ModuleDict({"up_proj": nn.Linear(8, 8), "down_proj": nn.Linear(8, 8)})
    with caplog.at_level(logging.WARNING, logger="hf_stablespam"):
        convert_to_4bit(model, FourBitConfig(**{field: ("up_proj", "dwon_proj")}))
    assert "'dwon_proj' in target_modules or modules_to_not_convert: no module of the model is called so" in caplog.text
    assert "'up_proj'" not in caplog.text
    assert "lm_head" not in caplog.text  # by default it is left alone, where there is one


@pytest.mark.parametrize(
    ("options", "idle"),
    [
        ({"modules_to_not_convert": "layers.1"}, False),
        ({"modules_to_not_convert": "embed"}, False),
        ({"modules_to_not_convert": r"layers\.[01]"}, True),
        ({"modules_to_not_convert": r"layers\.[01]\..*"}, False),
        ({"target_modules": ("layers.1", "q_proj")}, True),
    ],
)
def test_what_holds_layers_may_be_named_to_be_left_alone_only(
    options: dict, idle: bool, caplog: pytest.LogCaptureFixture
) -> None:
    convert_to_4bit(Model(), FourBitConfig(**options))
    assert ("holds layers, which target_modules and regular expressions must match themselves" in caplog.text) is idle


def test_last_blocks_of_a_model_without_blocks_are_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"keep_last_blocks=1 needs an nn.ModuleList .* name the blocks in modules_to"):
        convert_to_4bit(model, FourBitConfig(keep_last_blocks=1))
    assert names(model) == set()


def test_integer_weights_are_refused_by_name() -> None:
    model = Model()
    model.layers[1].q_proj.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(TypeError, match=r"layers.1.q_proj.weight must be floating-point .* got torch.uint8"):
        convert_to_4bit(model)
    assert names(model) == set()  # nothing is converted halfway


def test_fused_siblings_share_the_tensor_scale_of_nvfp4() -> None:
    model = convert_to_4bit(Model(), FourBitConfig.nvfp4())
    block = model.layers[0]
    with torch.no_grad():
        block.v_proj.weight[0, 0] = 9.0
    assert block.q_proj.shared_amax() == block.k_proj.shared_amax() == 9.0
    assert block.mlp[0].shared_amax() is None
    changed = block.q_proj.quantized_weight()
    alone = model.layers[0].q_proj.recipe.weight(block.q_proj.weight)
    assert torch.equal(changed, block.q_proj.recipe.weight(block.q_proj.weight, torch.tensor(9.0)))
    assert not torch.equal(changed, alone)
