"""`optim_args`: what is read, and the error of everything that is not."""

import pytest
import torch

from hf_stablespam.trainer.registration.options.lr_scales import OPTIONS as LR_SCALES
from hf_stablespam.trainer.registration.options.optim_args import aliases_of, option_table, parse_optim_args


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, {}),
        ("", {}),
        ("  ", {}),
        ("clip_beta=0.99", {"clip_beta": 0.99}),
        ("clip_beta=none, norm_betas=None", {"clip_beta": None, "norm_betas": None}),
        ("norm_betas=0.85:0.99999", {"norm_betas": (0.85, 0.99999)}),
        ("reset_interval=500,decay_steps=auto", {"reset_interval": 500, "decay_steps": "auto"}),
        ("decay_steps=20000,decay_floor=0.25", {"decay_steps": 20000, "decay_floor": 0.25}),
        ("decay_steps=none,maximize=True", {"decay_steps": None, "maximize": True}),
        ("foreach=false,fused=none", {"foreach": False, "fused": None}),
        ("state_dtype=bfloat16,stochastic_rounding=true", {"state_dtype": torch.bfloat16, "stochastic_rounding": True}),
        ("gamma1=0.8", {"norm_betas": (0.8, 0.9)}),
        ("gamma2=0.99,gamma1=0.8", {"norm_betas": (0.8, 0.99)}),
        (
            "gamma3=0.99,update_proj_gap=1000,total_T=20000",
            {"clip_beta": 0.99, "reset_interval": 1000, "decay_steps": 20000},
        ),
    ],
)
def test_reads(text, expected):
    assert parse_optim_args(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("norm_betas=0.7:0.9:0.9", "norm_betas must be two numbers joined by a colon"),
        ("gamma1=none", "gamma1 must be a number, got 'none'"),
        ("update_proj_gap=x", "update_proj_gap must be an integer or none, got 'x'"),
        ("clip_beta=0.9,", "must be name=value entries joined by commas, got ''"),
        ("=0.9", "must be name=value entries joined by commas, got '=0.9'"),
        ("clip_beta=", "must be name=value entries joined by commas, got 'clip_beta='"),
        ("clip_beta=0.9,clip_beta=0.8", "sets clip_beta twice, by 'clip_beta' and by 'clip_beta'; leave one"),
        ("gamma2=0.9,norm_betas=0.7:0.9", "sets norm_betas twice, by 'gamma2' and by 'norm_betas'"),
        ("norm_betas=none,gamma1=0.9", "sets norm_betas twice, by 'norm_betas' and by 'gamma1'"),
        ("gamma1=0.9,gamma1=0.8", "sets norm_betas twice, by 'gamma1' and by 'gamma1'"),
        ("betas=0.9:0.99", "does not take 'betas'; set adam_beta1 and adam_beta2 in TrainingArguments"),
        ("eps=1e-8", "does not take 'eps'; set adam_epsilon in TrainingArguments"),
        ("weight_decay=0.1", "does not take 'weight_decay'; set weight_decay in TrainingArguments"),
    ],
)
def test_refuses(text, message):
    """Beside those of `test_wrong_uses.py`."""
    with pytest.raises(ValueError, match=message):
        parse_optim_args(text)


def test_every_option_is_an_argument_of_the_optimizer():
    import inspect

    from hf_stablespam import StableSPAM

    keyword_only = {
        name
        for name, parameter in inspect.signature(StableSPAM).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    table = option_table("stable_spam")
    assert set(table) - {"layerwise", *LR_SCALES} == keyword_only
    assert {name for name, _ in aliases_of(table).values()} <= keyword_only
