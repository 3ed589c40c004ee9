"""FourBitConfig: presets, and a message for each bad value."""

from __future__ import annotations

import json

import pytest

from hf_stablespam.quant import FourBitConfig


def test_defaults_are_those_that_packed_checkpoints_know() -> None:
    config = FourBitConfig()
    assert (config.weight, config.activation, config.gradient) == ("int4", "int4", None)
    assert (config.group_size, config.activation_outliers, config.modules_to_not_convert) == (128, 2, ("lm_head",))


def test_block_formats_keep_no_outliers_by_default() -> None:
    assert FourBitConfig(activation="nvfp4").activation_outliers == 0
    assert FourBitConfig(activation="mxfp4", activation_outliers=1).activation_outliers == 1


@pytest.mark.parametrize(
    "config",
    [FourBitConfig(), FourBitConfig.paper("fp4"), FourBitConfig.nvfp4(gradient=True), FourBitConfig.gguf()],
    ids=str,
)
def test_a_configuration_survives_json(config: FourBitConfig) -> None:
    assert FourBitConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": "int5"}, r"weight must be one of 'int4', 'int4_asym'.* got 'int5' .did you mean 'int4'"),
        (
            {"activation": "int4_signed"},
            r"activation='int4_signed': this format is for weights only; set activation='int4'",
        ),
        (
            {"weight": "int4_signed", "weight_outliers": 1},
            r"weight_outliers must be 0 with weight='int4_signed', got 1",
        ),
        ({"activation": 4}, r"activation must be one of .*'nvfp4' or None, got 4"),
        ({"gradient": "fp8"}, "gradient must be one of"),
        ({"group_size": 0}, "group_size must be an integer, at least 1, got 0; 128"),
        ({"group_size": -1}, "group_size must be an integer, at least 1, got -1"),
        ({"group_size": 64.0}, "group_size must be an integer, at least 1, got 64.0"),
        ({"group_size": True}, "group_size must be an integer, at least 1, got True"),
        ({"activation_outliers": -1}, "activation_outliers must be an integer from 0 to 8, got -1; 0 keeps none"),
        ({"activation_outliers": 9}, "activation_outliers must be an integer from 0 to 8, got 9"),
        ({"weight_outliers": 1.5}, "weight_outliers must be an integer from 0 to 8, got 1.5"),
        ({"keep_last_blocks": -2}, "keep_last_blocks must be an integer, at least 0, got -2"),
        ({"gradient_rounding": "up"}, "gradient_rounding must be one of 'stochastic', 'nearest', got 'up'"),
        ({"hadamard": "some"}, "hadamard must be one of None, 'weight_grad', 'all', got 'some'"),
        ({"hadamard": "weight_grad"}, "hadamard='weight_grad' needs a gradient format, got gradient=None"),
        ({"hadamard_size": 24}, "hadamard_size must be 16, 32, 64 or 128, got 24"),
        ({"weight_block": "3d"}, "weight_block must be one of '1d', '2d', got '3d'"),
        ({"mx_scale_rule": "ceil"}, "mx_scale_rule must be one of 'even', 'floor', 'rceil', got 'ceil'"),
        ({"scale_dtype": "fp8"}, "scale_dtype must be one of 'bfloat16', 'float16', 'float32', got 'fp8'"),
        ({"four_over_six": True}, "four_over_six=True needs an operand in the format 'nvfp4'"),
        ({"four_over_six": "yes"}, "four_over_six must be True or False, got 'yes'"),
        ({"target_modules": ("(",)}, r"target_modules must hold names or regular expressions, got '\('"),
    ],
)
def test_bad_values_are_refused_with_field_rule_value_and_remedy(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FourBitConfig(**options)


def test_unknown_options_and_presets_name_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown option 'groupsize' of FourBitConfig .did you mean 'group_size'"):
        FourBitConfig.from_dict({"groupsize": 64})
    with pytest.raises(ValueError, match=r"must be 'int4' or 'fp4', got 'nvfp4'; for NVFP4 use FourBitConfig.nvfp4"):
        FourBitConfig.paper("nvfp4")
