"""FSDP1 and ZeRO are refused before training: told from the objects that configure them."""

import os
import re
from unittest import mock

import pytest
import transformers
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils.deepspeed import HfDeepSpeedConfig

from hf_stablespam.trainer.registration.flat_shards import fsdp_version, refuse_flat_shards, zero_stage
from tests.processes import run_code
from tests.trainer.helpers import arguments, tiny_trainer

INSTEAD = r"; use FSDP2 \(fsdp_version: 2 in accelerate's file, or fsdp_config=.*\), DDP, or DeepSpeed stage 0"


@pytest.fixture(autouse=True)
def _environment():
    """transformers 4 hands `fsdp` on to accelerate through the environment, where it would stay."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture
def args(tmp_path):
    return arguments(tmp_path)


def with_deepspeed(args, config):
    args.hf_deepspeed_config = HfDeepSpeedConfig(
        config
    )  # what transformers derives its own from, and needs the package for
    return args


def test_an_ordinary_run_is_allowed(args):
    assert fsdp_version(args) is None
    assert zero_stage(args) == 0
    refuse_flat_shards(args)


def test_fsdp1_is_refused_before_training(tmp_path):
    trainer = tiny_trainer(tmp_path)
    trainer.args.fsdp, trainer.args.fsdp_config, trainer.args.fsdp_plugin_args = True, {"version": 1}, None
    with pytest.raises(ValueError, match=f"optim=stable_spam does not work with FSDP version 1, .*{INSTEAD}"):
        trainer.create_optimizer()
    assert trainer.state.global_step == 0


def test_fsdp2_is_allowed(tmp_path):
    os.environ["FSDP_VERSION"] = "2"  # for transformers 4
    args = arguments(tmp_path, fsdp="full_shard", fsdp_config={"version": 2})
    assert fsdp_version(args) == 2
    refuse_flat_shards(args)


def test_transformers_4_reads_the_environment_only(args, monkeypatch):
    args.fsdp, args.fsdp_config, args.fsdp_plugin_args = True, {"version": 2}, None
    assert fsdp_version(args) == 1
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert fsdp_version(args) == 2


def test_transformers_5_hands_on_the_version(args):
    args.fsdp, args.fsdp_plugin_args = True, {"fsdp_version": 1}
    assert fsdp_version(args) == 1


@pytest.mark.parametrize(("config", "version"), [({"xla": True}, 1), ({"xla": True, "xla_fsdp_v2": True}, 2)])
def test_fsdp_of_torch_xla(args, config, version):
    args.fsdp, args.fsdp_config = True, config
    assert fsdp_version(args) == version


@pytest.mark.parametrize("version", [1, 2])
def test_what_accelerate_launch_configured_counts(args, monkeypatch, version):
    plugin = FullyShardedDataParallelPlugin(fsdp_version=version, reshard_after_forward=version == 2 or "full_shard")
    monkeypatch.setitem(AcceleratorState._shared_state, "fsdp_plugin", plugin)
    assert fsdp_version(args) == version


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_is_refused(args, stage):
    with_deepspeed(args, {"zero_optimization": {"stage": stage}})
    with pytest.raises(ValueError, match=f"does not work with DeepSpeed ZeRO stage {stage}, .*{INSTEAD}"):
        refuse_flat_shards(args)


@pytest.mark.parametrize("config", [{}, {"zero_optimization": {"stage": 0}}])
def test_deepspeed_without_zero_is_allowed(args, config):
    refuse_flat_shards(with_deepspeed(args, config))


def test_deepspeed_of_accelerate_launch_counts(args):
    args.deepspeed_plugin = object.__new__(DeepSpeedPlugin)  # without the package its own checks would not pass
    args.deepspeed_plugin.zero_stage = 2
    assert zero_stage(args) == 2


EVERYBODY = """
import importlib, os, sys
import transformers.integrations.deepspeed
sys.path.insert(0, sys.argv[2])
importlib.reload(transformers.integrations.deepspeed)  # which asked at its import
from transformers import TrainerControl, TrainerState, TrainingArguments
from hf_stablespam import GradientNormCallback, MomentumResetCallback, SpikeRecorder, StabilizeCallback
from hf_stablespam.trainer.registration.factory import optimizer_cls_and_kwargs

def said(what):
    try: what()
    except ValueError as error: return str(error)
    return "allowed"

kinds = {
    "zero 0": {"deepspeed": {"zero_optimization": {"stage": 0}}},
    "zero 2": {"deepspeed": {"zero_optimization": {"stage": 2}}},
    "fsdp 1": {"fsdp": "full_shard", "fsdp_config": {"version": 1}},
    "fsdp 2": {"fsdp": "full_shard", "fsdp_config": {"version": 2}},
}
for kind, options in kinds.items():
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
        os.environ.pop(name, None)  # transformers 4 leaves them behind, and each kind is to be met alone
    args = TrainingArguments(sys.argv[1], optim="stable_spam", max_grad_norm=0, use_cpu=True, report_to=[], **options)
    print(kind, "stable_spam", said(lambda: optimizer_cls_and_kwargs(args)), sep="|")
    for made in (
        StabilizeCallback(), GradientNormCallback(), SpikeRecorder(), MomentumResetCallback(5),
        MomentumResetCallback(on_spike=9),
    ):
        state = TrainerState(stateful_callbacks=[made] if hasattr(made, "state") else [])
        print(kind, type(made).__name__, said(lambda: made.on_init_end(args, state, TrainerControl())), sep="|")
"""


def test_through_training_arguments_with_a_stand_in_for_deepspeed(tmp_path, monkeypatch):
    """transformers asks for the package's name and version only, as long as nothing is trained."""
    packages = tmp_path / "packages"
    (packages / "deepspeed").mkdir(parents=True)
    (packages / "deepspeed" / "__init__.py").write_text('__version__ = "0.18.2"\n')
    (packages / "deepspeed-0.18.2.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.18.2\n"
    (packages / "deepspeed-0.18.2.dist-info" / "METADATA").write_text(metadata)
    if int(transformers.__version__.split(".")[0]) < 5:
        monkeypatch.setenv("FSDP_VERSION", "1")
    shown, _ = run_code(EVERYBODY, tmp_path / "out", packages)
    said = {tuple(line.split("|")[:2]): line.split("|")[2] for line in shown.splitlines() if line.count("|") == 2}
    names = {name for _, name in said}
    assert names == {
        *("stable_spam", "StabilizeCallback", "GradientNormCallback", "SpikeRecorder", "MomentumResetCallback")
    }
    for name in names:
        assert re.search(f"does not work with DeepSpeed ZeRO stage 2, .*{INSTEAD}|updated inside", said["zero 2", name])
        assert re.search(f"does not work with FSDP version 1, .*{INSTEAD}", said["fsdp 1", name])
        # DeepSpeed's engine steps inside of the backward pass, of whatever stage: callbacks come too late.
        sees_gradients = name in ("GradientNormCallback", "SpikeRecorder", "MomentumResetCallback")
        assert ("updated inside the backward pass" if sees_gradients else "allowed") in said["zero 0", name]
        assert said["fsdp 2", name] == "allowed" or int(transformers.__version__.split(".")[0]) < 5
