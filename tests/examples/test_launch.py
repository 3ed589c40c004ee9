"""The commands of docs/distributed.md, on two processes: they train as one process does, also under the launcher.

Those that are run start in a folder that knows nothing of the package but by `PYTHONPATH`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pretrain
import pytest
import torch

from hf_stablespam.trainer.launcher import launch as launcher
from tests.processes import run_processes

ROOT = Path(__file__).parents[2]
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
ACCELERATE = ("accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0")
# accelerate has no FSDP on the CPU, which therefore passes for an accelerator; bf16 would hide a difference.
FSDP2_ON_CPU = ("--config_file", f"{ROOT}/examples/configs/fsdp2.yaml", "--mixed_precision", "no")
CPU = f"{ROOT}/tests/trainer/launcher/cpu_as_accelerator.py"
SCRIPT = f"{ROOT}/examples/pretrain.py"
FOUR_BIT = ("--four_bit", "int4")
LAUNCHER = ("-m", "hf_stablespam", "--four-bit", "int4", "--gradient-norms")
FSDP2 = ("--fsdp", "full_shard auto_wrap", "--fsdp_config", f"{ROOT}/examples/configs/fsdp2.json")
GLOBAL_BATCH = 4


def options(folder, processes):
    return [
        *("--output_dir", str(folder), "--max_steps", "3", "--block_size", "32", "--max_eval_samples", "4"),
        *("--per_device_train_batch_size", str(GLOBAL_BATCH // processes), "--logging_steps", "1"),
        *("--optim", "stable_spam", "--max_grad_norm", "0"),
        *("--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "true"),
    ]


def log_history(folder):
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def losses(folder):
    return [row[name] for row in log_history(folder) for name in ("loss", "eval_loss") if name in row]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    pretrain.main([*options(folder, 1), *FOUR_BIT, "--use_cpu"])
    return losses(folder)


def assert_as_one(folder, expected, launched):
    assert losses(folder) == pytest.approx(expected, abs=1e-4)
    norms = [row["gradients/norm"] for row in log_history(folder) if "gradients/norm" in row]
    assert len(norms) == (3 if launched else 0)
    assert all(norm > 0 for norm in norms)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "own"),
    [
        pytest.param((*TORCHRUN, CPU, SCRIPT), (*FOUR_BIT, *FSDP2), marks=pytest.mark.long),
        ((*ACCELERATE, *FSDP2_ON_CPU, *LAUNCHER, CPU, SCRIPT), ()),
    ],
    ids=["torchrun", "accelerate"],
)
def test_two_processes_with_fsdp2_train_as_one(tmp_path, expected, command, own):
    done = subprocess.run(
        [sys.executable, "-m", *command, *options(tmp_path, 2), *own],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("distributed FSDP\n") == 2
    assert_as_one(tmp_path, expected, "hf_stablespam" in command)


def launched(arguments):
    assert launcher.main(arguments) == 0
    assert torch.distributed.get_world_size() == 2


@pytest.mark.slow
def test_two_processes_with_ddp_train_as_one(tmp_path, expected):
    """What each process of torchrun runs. accelerate, above, starts its own by torchrun's functions."""
    run_processes(2, launched, [*LAUNCHER[2:], SCRIPT, *options(tmp_path, 2), "--use_cpu"])
    assert_as_one(tmp_path, expected, launched=True)
