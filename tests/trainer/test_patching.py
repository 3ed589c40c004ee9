"""Methods of other libraries are wrapped once, and come back as they were."""

import pytest
from transformers import Trainer

from hf_stablespam.trainer import patching
from tests.docs.pages import ROOT
from tests.processes import run_code


class Owner:
    def method(self):
        return ["original"]

    @staticmethod
    def static():
        return ["static"]


class Heir(Owner):
    pass


@pytest.fixture(autouse=True)
def _own_table(monkeypatch):
    monkeypatch.setattr(patching, "_patches", {})


def saying(word):
    return lambda original: lambda *args: [*original(*args), word]


def test_a_patch_is_made_once_and_undone():
    before = vars(Owner)["method"], vars(Owner)["static"]
    for _ in range(2):
        patching.patch(Owner, "method", saying("ours"))
        patching.patch(Owner, "static", saying("ours"))
    assert Owner().method() == ["original", "ours"]
    assert Owner.static() == Owner().static() == ["static", "ours"]
    assert patching.patched() == ["Owner.method", "Owner.static"]
    patching.undo_patches()
    assert (vars(Owner)["method"], vars(Owner)["static"]) == before
    assert patching.patched() == []


def test_what_is_asked_for_again_replaces_what_was():
    patching.patch(Owner, "method", saying("first"))
    patching.patch(Owner, "method", saying("second"), again=True)
    assert Owner().method() == ["original", "second"]
    patching.undo_patches()
    assert Owner().method() == ["original"]


def test_an_inherited_method_is_inherited_again():
    patching.patch(Heir, "method", saying("ours"))
    assert Heir().method() == ["original", "ours"]
    assert Owner().method() == ["original"]
    patching.undo_patches()
    assert "method" not in vars(Heir)


def test_somebody_elses_wrapper_stays_and_ours_under_it_does_nothing():
    original = vars(Owner)["method"]
    patching.patch(Owner, "method", saying("ours"))
    ours = Owner.method
    Owner.method = lambda self: [*ours(self), "theirs"]
    try:
        assert Owner().method() == ["original", "ours", "theirs"]
        patching.undo_patches()
        assert Owner().method() == ["original", "theirs"]
    finally:
        Owner.method = original


CODE = """
import accelerate, inspect, pickle, sys, transformers
from peft.tuners.tuners_utils import BaseTuner
from transformers.training_args import OptimizerNames
from transformers.trainer_callback import CallbackHandler

def classes():
    owners = (transformers.Trainer, CallbackHandler, accelerate.Accelerator, transformers.TrainerCallback,
              transformers.GenerationMixin, transformers.TrainerState, BaseTuner)
    return [{name: inspect.getattr_static(owner, name) for name in dir(owner)} for owner in owners]

def names():
    return list(OptimizerNames), dict(OptimizerNames.__members__), sorted(OptimizerNames._value2member_map_)

before = classes(), names()
import hf_stablespam
from hf_stablespam.trainer.launcher.attach import LaunchOptions, attach_callbacks
from hf_stablespam.trainer.patching import patched
assert (classes(), names()) != before
hf_stablespam.GradientNormCallback(), hf_stablespam.MomentumResetCallback(every=5), hf_stablespam.SpikeRecorder()
hf_stablespam.FourBitCallback()
attach_callbacks(LaunchOptions())
print(patched())
hf_stablespam.unregister()
assert (classes(), names()) == before
assert not hasattr(OptimizerNames, "STABLE_SPAM")
hf_stablespam.register()
assert transformers.TrainingArguments("out", optim="stable_spam", max_grad_norm=0).optim.value == "stable_spam"
"""


def test_unregistering_leaves_the_originals_and_the_page_names_all_that_is_wrapped():
    written, _ = run_code(CODE)
    rows = [
        line.split("`")[1] for line in (ROOT / "docs/patches.md").read_text().splitlines() if line.startswith("| `")
    ]
    if not hasattr(Trainer, "_mixed_mesh_grad_norm"):
        rows.remove("Trainer._mixed_mesh_grad_norm")  # the page says: where transformers has it
    assert sorted(rows) == eval(written.splitlines()[-1])
