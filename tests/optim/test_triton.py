"""The Triton kernels, in Triton's interpreter, or on a GPU where there is one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_stablespam.optim.backends import has_triton

CASES = Path(__file__).with_name("triton_cases.py")


@pytest.mark.slow
@pytest.mark.skipif(not has_triton(), reason="triton is not installed: the kernels cannot run, not even interpreted")
def test_the_kernels():
    # a process of its own: the interpreter must be chosen before anything imports triton
    environment = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    done = subprocess.run(command, cwd=CASES.parents[2], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
