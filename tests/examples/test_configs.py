"""The shipped FSDP2 configurations say what the documentation says they do."""

import os
from pathlib import Path
from unittest import mock

from accelerate.commands.config.config_args import load_config_from_file

from hf_stablespam.trainer.registration.flat_shards import fsdp_version, refuse_flat_shards
from tests.trainer.helpers import arguments

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"


def test_accelerate_reads_the_yaml_file():
    config = load_config_from_file(str(CONFIGS / "fsdp2.yaml"))  # refuses unknown keys
    assert config.distributed_type == "FSDP"
    assert config.fsdp_config["fsdp_version"] == 2


def test_the_trainer_reads_the_json_file(tmp_path):
    """`tests/trainer/test_distributed.py` trains with it."""
    with mock.patch.dict(os.environ):  # by which transformers 4 speaks to accelerate
        os.environ["FSDP_VERSION"] = "2"
        args = arguments(tmp_path, fsdp="full_shard auto_wrap", fsdp_config=str(CONFIGS / "fsdp2.json"))
    assert fsdp_version(args) == 2
    refuse_flat_shards(args)
