"""The Triton kernel: in the interpreter it equals the ordinary quantizer bit for bit, and it compiles for a GPU.

Neither needs a GPU; that it also runs on one is not shown here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_stablespam.quant import FourBitConfig, FourBitLinear

ROOT = Path(__file__).parents[3]


def run(module: str, **environment: str) -> str:
    """Output of a test module in a process of its own: Triton decides at import whether to interpret."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.fixture(autouse=True)
def _triton() -> None:
    pytest.importorskip("triton", reason="the kernel needs Triton (Linux on x86-64)")


@pytest.mark.slow
def test_in_the_interpreter_it_equals_the_ordinary_quantizer() -> None:
    lines = run("tests.quant.formats.fused_in_interpreter", TRITON_INTERPRET="1").splitlines()
    experts = [f"{name} experts: True kernels: {count}" for name, count in (("int4", 1), ("mxfp4", 1), ("nvfp4", 0))]
    assert lines == ["compared: 185", *experts]


@pytest.mark.slow
def test_it_compiles_for_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    lines = run("tests.quant.formats.fused_for_gpu", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    assert [line.split()[0] for line in lines] == ["int4", "int4_asym", "mxfp4", "nvfp4"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; the interpreter stands in for it elsewhere")
@pytest.mark.parametrize("name", ["int4", "int4_asym", "fp4_e2m1", "mxfp4", "nvfp4"])
def test_on_a_gpu_it_equals_the_ordinary_quantizer(name: str) -> None:
    x = torch.randn(64, 1376, device="cuda", dtype=torch.bfloat16)
    for operand in ("weight", "activation"):
        plain, fused = (
            FourBitConfig(name, "int4" if name == "int4_asym" else name, fused=value).quantizer(operand)
            for value in (False, True)
        )
        assert torch.equal(plain(x), fused(x))


def test_on_a_cpu_the_option_has_no_effect() -> None:
    torch.manual_seed(0)
    layer = FourBitLinear(64, 32, config=FourBitConfig(fused=True))
    plain = FourBitLinear(64, 32, config=FourBitConfig())
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(4, 64)
    assert torch.equal(layer(x), plain(x))
