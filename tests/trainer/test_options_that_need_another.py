"""An option that counts for nothing without another is an error that names both, in callbacks, configs and commands."""

from typing import Any

import pytest

from hf_stablespam import (
    FourBitCallback,
    FourBitConfig,
    MomentumResetCallback,
    StabilizeCallback,
)
from hf_stablespam.quant.config_checks import NEEDS
from hf_stablespam.trainer.export_command import ONLY_FOR
from hf_stablespam.trainer.export_command import main as export_command
from tests.trainer.helpers import arguments

# What makes the option count; what is left out then; the option and a value that is not its default.
OBJECTS: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
    (FourBitCallback, {"export": True}, {"leave_unpackable": True}),
    (FourBitCallback, {"export": "packed"}, {"leave_unpackable": True}),
    (MomentumResetCallback, {"every": 10, "on_spike": 10}, {"spike_window": 50}),
    (MomentumResetCallback, {"every": 10, "on_spike": 10}, {"spike_pause": 50}),
    (StabilizeCallback, {"norm_betas": (0.7, 0.9)}, {"eps": 1e-6}),
    (FourBitConfig, {"gradient": "int4"}, {"gradient_rounding": "nearest"}),
    (FourBitConfig, {"gradient": "int4", "hadamard": "all"}, {"hadamard_size": 32}),
    (FourBitConfig, {"gradient": "int4", "hadamard": "all"}, {"hadamard_seed": 1}),
    (FourBitConfig, {"weight": "int4"}, {"weight_block": "2d"}),
    (FourBitConfig, {"weight": "int4"}, {"weight_outliers": 2}),
    (FourBitConfig, {"weight": "int4"}, {"adapters": "merged"}),
    (FourBitConfig, {"weight": "int4"}, {"scale_dtype": "float16"}),
    (FourBitConfig, {"activation": "int4"}, {"activation_outliers": 2}),
    (FourBitConfig, {"activation": "mxfp4"}, {"mx_scale_rule": "floor"}),
    (FourBitConfig, {"weight": "nvfp4"}, {"four_over_six": True}),
]
WITHOUT = {
    "export": [False, "gguf", "model.gguf"],
    "on_spike": [None],
    "norm_betas": [None],
    "gradient": [None],
    "hadamard": [None],
    "weight": [None],
    "activation": [None],
}


@pytest.mark.parametrize(("made", "needed", "option"), OBJECTS, ids=lambda part: str(part))
def test_objects(made, needed, option):
    made(**needed, **option)
    (name, value) = next(iter(option.items()))
    last = list(needed)[-1]
    for missing in WITHOUT[last]:
        with pytest.raises(ValueError, match=name) as caught:
            made(**{**needed, last: missing}, **option)
        assert str(value) in str(caught.value)
        assert last in str(caught.value)


def test_the_table_has_every_such_field_of_the_configuration():
    assert {name for made, _, option in OBJECTS for name in option if made is FourBitConfig} == set(NEEDS)


OPTIONS = {"leave_unpackable": [], "dtype": ["float16"], "embedding": ["f16"], "overwrite": []}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_export(option, capsys):
    other = "gguf" if ONLY_FOR[option] != "gguf" else "unpacked"
    written = "--" + option.replace("_", "-")
    with pytest.raises(SystemExit):
        export_command(["checkpoint", "output", "--to", other, written, *OPTIONS[option]])
    assert f"{written} counts for nothing with --to {other}; leave it out, or write --to" in capsys.readouterr().err
    assert set(OPTIONS) == set(ONLY_FOR)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"optim_args": "decay_steps=none,decay_floor=0.1"}, "decay_steps"),
        ({"optim_args": "update_proj_gap=50,scale=0.5"}, "rank"),
        ({"optim_target_modules": "all-linear"}, "rank"),
        ({"optim": "spam", "optim_args": "threshold=none,clip_delay=5"}, "threshold"),
        ({"optim": "spam", "optim_args": "reset_interval=none,warmup_steps=5"}, "reset_interval"),
        ({"optim": "spam", "optim_target_modules": "all-linear"}, "rank"),
    ],
    ids=str,
)
def test_training_arguments(tmp_path, given, named):
    with pytest.raises(ValueError, match=named):
        arguments(tmp_path, **given)
