"""The commands of docs/distributed.md, on two processes: they train as one process does, also under the launcher."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pretrain
import pytest

ROOT = Path(__file__).parents[2]
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
ACCELERATE = ("accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0")
# accelerate has no FSDP on the CPU, which therefore passes for an accelerator; bf16 would hide a difference.
FSDP2_ON_CPU = ("--config_file", "examples/configs/fsdp2.yaml", "--mixed_precision", "no")
CPU = "tests/trainer/launcher/cpu_as_accelerator.py"
SCRIPT = "examples/pretrain.py"
FOUR_BIT = ("--four_bit", "int4")
LAUNCHER = ("-m", "hf_stablespam", "--four-bit", "int4", "--gradient-norms")
FSDP2 = ("--fsdp", "full_shard auto_wrap", "--fsdp_config", "examples/configs/fsdp2.json")
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "own", "sharded"),
    [
        ((*TORCHRUN, *LAUNCHER, SCRIPT), ("--use_cpu",), False),
        pytest.param((*TORCHRUN, CPU, SCRIPT), (*FOUR_BIT, *FSDP2), True, marks=pytest.mark.long),
        ((*ACCELERATE, *FSDP2_ON_CPU, *LAUNCHER, CPU, SCRIPT), (), True),
    ],
    ids=["torchrun, DDP", "torchrun, FSDP2", "accelerate, FSDP2"],
)
def test_two_processes_train_as_one(tmp_path, expected, command, own, sharded):
    done = subprocess.run(
        [sys.executable, "-m", *command, *options(tmp_path, 2), *own],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("distributed FSDP\n") == (2 if sharded else 0)
    assert losses(tmp_path) == pytest.approx(expected, abs=1e-4)
    norms = [row["gradients/norm"] for row in log_history(tmp_path) if "gradients/norm" in row]
    assert len(norms) == (3 if "hf_stablespam" in command else 0)
    assert all(norm > 0 for norm in norms)
