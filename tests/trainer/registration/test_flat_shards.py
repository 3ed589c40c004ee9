"""FSDP1 and ZeRO are refused before training: told from the objects that configure them."""

import os
from unittest import mock

import pytest
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils.deepspeed import HfDeepSpeedConfig

from hf_stablespam.trainer.registration.flat_shards import fsdp_version, refuse_flat_shards, zero_stage
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
