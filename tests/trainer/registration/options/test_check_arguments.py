"""What is wrong in `optim_args`, or would count for nothing, is said when the arguments are made."""

import pytest
from transformers import HfArgumentParser, TrainingArguments

import hf_stablespam  # noqa: F401 (registers the optimizers)
from hf_stablespam.trainer.registration.options.optim_args import parse_optim_args
from tests.trainer.helpers import arguments
from tests.trainer.test_wrong_uses import ARGUMENTS, assert_refused

NOTHING = "which counts for nothing without"
LAYERS = {"optim_target_modules": "all-linear"}


@pytest.mark.parametrize("wrong", [one for one in ARGUMENTS if one.value != "['zz']"], ids=lambda wrong: str(wrong.use))
def test_before_a_model_is_there(tmp_path, wrong):
    assert_refused(wrong, lambda: arguments(tmp_path, **wrong.use))


def test_on_the_command_line(tmp_path):
    words = ["--output_dir", str(tmp_path), "--optim", "stable_spam", "--optim_args", "clip_bata=0.9"]
    with pytest.raises(ValueError, match="did you mean 'clip_beta'"):
        HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(words)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"optim_args": "decay_steps=none,decay_floor=0.2"}, f"decay_floor=0.2, {NOTHING} decay_steps"),
        ({"optim_args": "scale=0.5"}, f"scale=0.5, {NOTHING} rank; set rank, or leave scale out"),
        ({"optim_args": "rank=none,proj_type=left"}, f"proj_type=left, {NOTHING} rank"),
        (
            {"optim": "spam", "optim_args": "reset_interval=none,warmup_steps=9"},
            f"warmup_steps=9, {NOTHING} reset_interval",
        ),
        ({"optim": "spam", "optim_args": "threshold=none,clip_delay=9"}, f"clip_delay=9, {NOTHING} threshold"),
        ({"optim": "spam", **LAYERS}, "optim_target_modules must be left out with optim=spam"),
    ],
)
def test_options_that_count_for_nothing(tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        arguments(tmp_path, **options)


def test_the_gap_beside_a_rank_that_is_off():
    assert parse_optim_args("rank=none,update_proj_gap=500") == {"rank": None, "reset_interval": 500}
    assert parse_optim_args("rank=4,update_proj_gap=500") == {"rank": 4, "update_proj_gap": 500}


def test_other_optimizers_are_none_of_ours(tmp_path):
    assert arguments(tmp_path, optim="adamw_torch", optim_args="clip_bata=1").optim_args == "clip_bata=1"
