"""Every wrong use is one error, before any training step, that names the field, the rule, the value and the remedy."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler

from hf_stablespam import (
    FourBitCallback,
    FourBitConfig,
    GradientNormCallback,
    MomentumResetCallback,
    SpikeRecorder,
    StabilizeCallback,
    StableSPAM,
    last_complete_checkpoint,
)
from hf_stablespam.trainer.launcher.attach import LaunchOptions, attach_callbacks
from hf_stablespam.trainer.launcher.launch import main as launch
from tests.trainer.helpers import tiny_trainer


class Wrong(NamedTuple):
    """A wrong use, and the four parts of its error's message."""

    use: Any
    field: str
    rule: str
    value: str
    remedy: str


def assert_says_all(message: str, wrong: Wrong) -> None:
    missing = [name for name in Wrong._fields[1:] if getattr(wrong, name) not in message]
    assert not missing, f"no {' and no '.join(missing)} in: {message}"


class Steps(TrainerCallback):
    """Counts the optimizer's steps."""

    taken = 0

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.taken += 1


SPAM = {"optim": "spam"}
LAYERS = {"optim_target_modules": "all-linear"}
DEFAULT = "out for its default"

# What TrainingArguments say.
ARGUMENTS = [
    Wrong({"optim_args": "clip_bata=0.9"}, "optim_args", "unknown option", "'clip_bata'", "did you mean 'clip_beta'?"),
    Wrong({"optim_args": "zzz=1"}, "optim_args", "unknown option", "'zzz'", "known options: clip_beta, norm_betas"),
    Wrong({"optim_args": "clip_beta=high"}, "clip_beta", "must be a number or none", "'high'", DEFAULT),
    Wrong({"optim_args": "norm_betas=0.7"}, "norm_betas", "must be two numbers joined by a colon", "'0.7'", DEFAULT),
    Wrong({"optim_args": "reset_interval=1.5"}, "reset_interval", "must be an integer or none", "'1.5'", DEFAULT),
    Wrong({"optim_args": "decay_steps=soon"}, "decay_steps", "must be an integer, auto or none", "'soon'", DEFAULT),
    Wrong({"optim_args": "decay_floor=none"}, "decay_floor", "must be a number", "'none'", DEFAULT),
    Wrong({"optim_args": "state_dtype=int8"}, "state_dtype", "must be float32, bfloat16", "'int8'", DEFAULT),
    Wrong({"optim_args": "fused=maybe"}, "fused", "must be true, false or none", "'maybe'", DEFAULT),
    Wrong({"optim_args": "clip_beta"}, "optim_args", "must be name=value entries", "'clip_beta'", "write it as in"),
    Wrong({"optim_args": "clip_beta=0.9,gamma3=0.9"}, "clip_beta", "twice", "'gamma3'", "leave one of them out"),
    Wrong({"optim_args": "lr=0.1"}, "optim_args", "does not take", "'lr'", "set learning_rate in TrainingArguments"),
    Wrong({"optim_args": "clip_beta=1.5"}, "clip_beta", "must be in [0, 1)", "1.5", "None switches clipping off"),
    Wrong({"optim_args": "norm_betas=0.7:1"}, "norm_betas[1]", "must be in [0, 1)", "1.0", "None switches"),
    Wrong({"optim_args": "reset_interval=0"}, "reset_interval", "must be a whole number of steps >= 1", "0", "None"),
    Wrong({"optim_args": "decay_steps=-3"}, "decay_steps", "must be a whole number of steps >= 1", "-3", "None"),
    Wrong({"optim_args": "decay_floor=2"}, "decay_floor", "must be in [0, 1]", "2.0", "0.5 is the value of the paper"),
    Wrong({"optim_args": "state_bits=16"}, "state_bits", "must be 4, 8 or 32", "16", "32 keeps the moments"),
    Wrong({"optim_args": "state_bits=8,state_dtype=bfloat16"}, "state_dtype", "must be None", "bfloat16", "set one"),
    Wrong({"learning_rate": -1.0}, "lr", "must be a number >= 0", "-1.0", "such as 1e-3"),
    Wrong({"adam_beta1": 1.0}, "betas[0]", "must be in [0, 1)", "1.0", "Adam's are (0.9, 0.999)"),
    Wrong({"adam_epsilon": -1e-8}, "eps", "must be a number >= 0", "-1e-08", "1e-8 is Adam's"),
    Wrong({"weight_decay": -0.1}, "weight_decay", "must be a number >= 0", "-0.1", "0 switches it off"),
    Wrong({"optim_args": "rank=4"}, "optim_args", "needs optim_target_modules", "rank=4", "set it to 'all-linear'"),
    Wrong(LAYERS, "optim_target_modules", "needs rank", "'all-linear'", "such as optim_args='rank=128'"),
    Wrong({"optim_args": "rank=4", "optim_target_modules": ["zz"]}, "modules", "must match", "['zz']", "'all-linear'"),
    Wrong({"optim_args": "rank=0", **LAYERS}, "rank", "must be a whole number >= 1", "0", "None switches"),
    Wrong(
        {"optim_args": "rank=2,proj_type=up", **LAYERS}, "proj_type", "must be one of std", "'up'", "std is GaLore's"
    ),
    Wrong({"optim_args": "rank=2,update_proj_gap=0", **LAYERS}, "update_proj_gap", "must be", "0", "200 is GaLore's"),
    Wrong(
        {"optim_args": "layerwise=true", "gradient_accumulation_steps": 2},
        *("gradient_accumulation_steps", "must be 1", "got 2", "raise per_device_train_batch_size"),
    ),
    Wrong(
        {"optim_args": "layerwise=true", "max_grad_norm": 1.0},
        *("max_grad_norm", "must be 0", "got 1.0", "set max_grad_norm=0"),
    ),
    Wrong({**SPAM, "optim_args": "densty=1"}, "optim_args", "unknown option", "'densty'", "did you mean 'density'?"),
    Wrong({**SPAM, "optim_args": "density=half"}, "density", "must be a number", "'half'", DEFAULT),
    Wrong({**SPAM, "optim_args": "density=2"}, "density", "must be in (0, 1]", "2.0", "1.0 trains every entry"),
]

# What callbacks are made with: refused when they are made, or when the Trainer that gets them is.
OBJECTS: list[Wrong] = [
    Wrong(lambda: GradientNormCallback(by="layer"), "by", 'must be "block", "tensor" or None', "'layer'", "None logs"),
    Wrong(lambda: GradientNormCallback(spike_score=50), "spike_score", 'must be "tensor"', "50", "None logs no score"),
    Wrong(
        lambda: GradientNormCallback(updates="no"), "updates", "must be True or False", "'no'", "False logs no update"
    ),
    Wrong(lambda: SpikeRecorder(keep=0), "keep", "must be an integer of at least 1", "0", "1000 is usual"),
    Wrong(lambda: SpikeRecorder(above=1), "above", "must be a finite number above 1", "1", "10 is usual"),
    Wrong(lambda: MomentumResetCallback(every=0), "every", "must be an integer of at least 1", "0", "None switches"),
    Wrong(lambda: MomentumResetCallback(at=500), "at", "must be a list of steps", "500", "or every=..."),
    Wrong(lambda: MomentumResetCallback(at="500"), "at", "must be a list of steps", "'500'", "write at=[...]"),
    Wrong(lambda: MomentumResetCallback(at=[0]), "at", "must be an integer of at least 1", "0", "steps count from 1"),
    Wrong(lambda: MomentumResetCallback(on_spike=1), "on_spike", "must be a finite number above 1", "1", "None"),
    Wrong(lambda: MomentumResetCallback(9, warmup_steps=9), "warmup_steps", "must be below every=9", "9", "use fewer"),
    Wrong(lambda: MomentumResetCallback(9, spike_window=1), "spike_window", "at least 5", "1", "100 is usual"),
    Wrong(lambda: MomentumResetCallback(9, spike_pause=0), "spike_pause", "at least 1", "0", "100 is usual"),
    Wrong(MomentumResetCallback, "every, at and on_spike", "never resets", "all unset", "set one"),
    Wrong(lambda: FourBitCallback("int4"), "config", "must be a FourBitConfig", "str", "use FourBitConfig(...)"),
    Wrong(
        lambda: FourBitCallback({"weight": "int4"}), "config", "must be a FourBitConfig", "dict", "use FourBitConfig"
    ),
    Wrong(lambda: FourBitConfig(weight="int5"), "weight", "must be one of", "'int5'", "did you mean 'int4'?"),
    Wrong(lambda: FourBitConfig(group_size=0), "group_size", "must be an integer, at least 1", "0", "128 suits"),
    Wrong(lambda: StabilizeCallback(clip_beta=1), "clip_beta", "must be in [0, 1)", "1", "None switches clipping off"),
    Wrong(lambda: StabilizeCallback(norm_betas=(0.7,)), "norm_betas", "must be two numbers", "(0.7,)", "None switches"),
    Wrong(lambda: last_complete_checkpoint(".", before=0), "before", "must be an integer of at least 1", "0", "None"),
]


def use(callbacks: Callable[[], list], **overrides: Any) -> tuple[Callable[[], list], dict[str, Any]]:
    return callbacks, overrides


# What does not go together, or comes in the wrong order.
TOGETHER = [
    Wrong(
        use(lambda: [MomentumResetCallback(every=10)], optim_args="reset_interval=500"),
        *("reset_interval", "which owns the resets", "=500", "leave reset_interval out, or remove the callback"),
    ),
    Wrong(
        use(lambda: [MomentumResetCallback(every=10)], optim_args="update_proj_gap=500"),
        *("reset_interval", "which owns the resets", "=500", "leave reset_interval out, or remove the callback"),
    ),
    Wrong(
        use(lambda: [MomentumResetCallback(every=10)], **SPAM, optim_args="reset_interval=4"),
        *("reset_interval", "which owns the resets", "=4", "leave reset_interval out, or remove the callback"),
    ),
    Wrong(
        use(lambda: [MomentumResetCallback(every=10), MomentumResetCallback(at=[5])]),
        *("MomentumResetCallbacks", "resets have one owner", "two", "give the steps of both to one callback"),
    ),
    Wrong(
        use(lambda: [MomentumResetCallback(every=10)], optim="sgd"),
        *("optimizer", "that keeps moments", "SGD", "remove the callback, or use an optimizer such as stable_spam"),
    ),
    Wrong(
        use(lambda: [StabilizeCallback()]),
        *("optimizer", "must not clip and normalise by itself", "StableSPAM", "use it as it is"),
    ),
    Wrong(
        use(lambda: [StabilizeCallback(), StabilizeCallback(eps=1e-6)], optim="sgd"),
        *("optimizer", "must not be stabilised twice", "SGD", "call optimizer.stabilizer.remove() first"),
    ),
]


def train(folder, steps, callbacks, overrides):
    tiny_trainer(folder, callbacks=[*callbacks(), steps], **overrides).train()


def assert_refused(wrong, function):
    with pytest.raises((ValueError, TypeError)) as caught:
        function()
    assert_says_all(str(caught.value), wrong)


@pytest.mark.parametrize("wrong", ARGUMENTS, ids=lambda wrong: str(wrong.use))
def test_arguments(tmp_path, wrong):
    steps = Steps()
    assert_refused(wrong, lambda: train(tmp_path, steps, list, wrong.use))
    assert steps.taken == 0


@pytest.mark.parametrize("wrong", OBJECTS, ids=lambda wrong: f"{wrong.field} {wrong.value}")
def test_objects(wrong):
    assert_refused(wrong, wrong.use)


@pytest.mark.parametrize("wrong", TOGETHER, ids=lambda wrong: f"{wrong.value} {wrong.rule}")
def test_what_does_not_go_together(tmp_path, wrong):
    steps = Steps()
    assert_refused(wrong, lambda: train(tmp_path, steps, *wrong.use))
    assert steps.taken == 0


def test_a_callback_added_after_the_trainer_was_made(tmp_path):
    wrong = TOGETHER[0]
    trainer = tiny_trainer(tmp_path, optim_args="reset_interval=500")
    trainer.add_callback(MomentumResetCallback(every=10))
    assert_refused(wrong, trainer.train)
    assert trainer.state.global_step == 0


def test_a_step_before_the_trainer_has_said_how_many_there_are():
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = StableSPAM([param], decay_steps="auto")
    param.grad = torch.ones(2)
    wrong = Wrong(None, "decay_steps", "must be a number of update steps or None", "'auto'", "pass it yourself")
    assert_refused(wrong, optimizer.step)
    assert param.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("options", "own", "wrong"),
    [
        ({"gradient_norms": True}, GradientNormCallback, Wrong(None, "--gradient-norms", "", "GradientNorm", "leave")),
        (
            {"reset_every": 5},
            MomentumResetCallback(every=2),
            Wrong(None, "--reset-every", "", "MomentumRes", "leave -"),
        ),
        ({"four_bit": "int4"}, FourBitCallback(), Wrong(None, "--four-bit", "", "FourBitCallback", "leave --four-bit")),
    ],
)
def test_a_callback_that_the_script_has_already(tmp_path, monkeypatch, options, own, wrong):
    monkeypatch.setattr(CallbackHandler, "__init__", CallbackHandler.__init__)
    attach_callbacks(LaunchOptions(**options, built=str(tmp_path / "built")))
    wrong = wrong._replace(rule="would attach a second")
    assert_refused(wrong, lambda: tiny_trainer(tmp_path, callbacks=[own]))


@pytest.mark.parametrize(
    "wrong",
    [
        Wrong(["nowhere.py"], "SCRIPT", "must be an existing file", "'nowhere.py'", "give its path ($(which NAME)"),
        Wrong(["--reset-every", "0", __file__], "--reset-every", "integer of at least 1", "'0'", "leave it out"),
        Wrong(
            ["--reset-every", "often", __file__], "--reset-every", "integer of at least 1", "'often'", "leave it out"
        ),
        Wrong(["--reset-every=-5", __file__], "--reset-every", "integer of at least 1", "'-5'", "leave it out"),
        Wrong(["--four_bit", "int5", __file__], "--four-bit", "must be one of", "'int5'", "did you mean 'int4'?"),
        Wrong(
            ["--four-bit", "none.json", __file__],
            "--four-bit",
            "a JSON object or a .json file",
            "'none.json'",
            "No such file",
        ),
        Wrong(["--four-bit", "{'a'", __file__], "--four-bit", "a format or a JSON object", "\"{'a'\"", "not JSON"),
        Wrong(
            ["--four-bit", '{"wieght": "int4"}', __file__],
            "--four-bit",
            "unknown option",
            "'wieght'",
            "did you mean 'weight'?",
        ),
        Wrong(["--four-bit", "int5", __file__], "--four-bit", "must be one of", "'int5'", "did you mean 'int4'?"),
        Wrong(["-m"], "SCRIPT", "required", "", "usage: python -m hf_stablespam"),
        Wrong(["--gradient-norm", __file__], "--gradient-norm", "unrecognized arguments", "", "[--gradient-norms]"),
    ],
    ids=lambda wrong: " ".join(wrong.use[:2]),
)
def test_flags_of_the_launcher(wrong, capsys):
    with pytest.raises(SystemExit) as caught:
        launch(wrong.use)
    assert caught.value.code == 2
    assert_says_all(capsys.readouterr().err, wrong)


def test_there_are_as_many_as_promised():
    assert len(ARGUMENTS) + len(OBJECTS) + len(TOGETHER) >= 40
