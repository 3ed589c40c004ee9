"""MXFP4 and NVFP4: bit for bit what torchao makes, the 4-or-6 rule, square blocks."""

from __future__ import annotations

import pytest
import torch

from hf_stablespam.quant import FourBitConfig
from hf_stablespam.quant.formats.quantizer import quantize

torchao = pytest.importorskip("torchao", reason="torchao is the oracle here; install the extra 'lowbit'")
from torchao.prototype.mx_formats.config import ScaleCalculationMode  # noqa: E402
from torchao.prototype.mx_formats.mx_tensor import MXTensor  # noqa: E402
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale  # noqa: E402


def numbers(dtype: torch.dtype, magnitude: float) -> torch.Tensor:
    """Numbers over many powers of two, with a block of zeros."""
    x = torch.randn(64, 256) * torch.exp(2 * torch.randn(64, 256)) * magnitude
    x[3, :32] = 0
    return x.to(dtype)


@pytest.mark.parametrize("magnitude", [1.0, 1e-6, 1e5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
class TestAgainstTorchao:
    def test_nvfp4(self, dtype: torch.dtype, magnitude: float) -> None:
        x = numbers(dtype, magnitude)
        oracle = NVFP4Tensor.to_nvfp4(x, per_tensor_scale=per_tensor_amax_to_scale(x.abs().amax()))
        quantizer = FourBitConfig.nvfp4().quantizer("weight")
        assert torch.equal(quantizer(x), oracle.dequantize(dtype))
        assert torch.equal(quantize(x, quantizer).block_scale.squeeze(-1), oracle.scale.float())

    @pytest.mark.parametrize("rule", ["floor", "even", "rceil"])
    def test_mxfp4(self, dtype: torch.dtype, magnitude: float, rule: str) -> None:
        x = numbers(dtype, magnitude)
        oracle = MXTensor.to_mx(x, torch.float4_e2m1fn_x2, 32, ScaleCalculationMode[rule.upper()])
        quantizer = FourBitConfig(weight="mxfp4", mx_scale_rule=rule).quantizer("weight")
        assert torch.equal(quantizer(x), oracle.dequantize(dtype))


def signal_to_noise(x: torch.Tensor, quantized: torch.Tensor) -> float:
    return float(10 * torch.log10(x.square().sum() / (x - quantized).square().sum()))


@pytest.mark.parametrize(
    ("options", "decibel"),
    [
        ({"weight": "int4_asym"}, 19.95),
        ({"weight": "int4"}, 18.61),
        ({"weight": "int4", "weight_outliers": 2}, 20.42),
        ({"weight": "int4_signed"}, 19.71),
        ({"weight": "int4_signed", "group_size": 32}, 21.32),
        ({"weight": "fp4_e1m2"}, 18.61),
        ({"weight": "fp4_e1m2_official", "weight_outliers": 2}, 15.56),
        ({"weight": "fp4_e2m1"}, 19.26),
        ({"weight": "nvfp4"}, 20.44),
        ({"weight": "nvfp4", "four_over_six": True}, 21.21),
        ({"weight": "nvfp4", "weight_block": "2d"}, 19.06),
        ({"weight": "mxfp4", "mx_scale_rule": "floor"}, 18.78),
        ({"weight": "mxfp4", "mx_scale_rule": "even"}, 19.02),
        ({"weight": "mxfp4", "mx_scale_rule": "rceil"}, 18.75),
    ],
    ids=str,
)
def test_the_noise_of_each_format_on_normal_numbers_is_the_known_one(options: dict, decibel: float) -> None:
    x = torch.randn(1024, 1024)
    assert signal_to_noise(x, FourBitConfig(**options).quantizer("weight")(x)) == pytest.approx(decibel, abs=0.06)


def test_four_or_six_takes_the_better_of_both_for_every_block() -> None:
    x = torch.randn(32, 256)
    both = FourBitConfig.nvfp4()
    either = FourBitConfig(weight="nvfp4", four_over_six=True).quantizer("weight")

    def block_errors(quantized: torch.Tensor) -> torch.Tensor:
        return (quantized - x).square().unflatten(-1, (-1, 16)).sum(-1)

    result = quantize(x, either)
    codes_used = result.codes.abs().amax(-1)
    assert {4.0, 6.0} <= set(codes_used.unique().tolist())
    assert block_errors(either(x)).mean() < block_errors(both.quantizer("weight")(x)).mean() * 0.9
    four_only = result.block_scale.squeeze(-1)[codes_used == 4]
    assert (four_only <= 384).all()


@pytest.mark.parametrize(("name", "size"), [("nvfp4", 16), ("mxfp4", 32), ("int4", 32), ("int4_asym", 32)])
@pytest.mark.parametrize("rows", [64, 50])
def test_square_blocks_have_one_scale_and_are_the_same_transposed(name: str, size: int, rows: int) -> None:
    x = torch.randn(rows, 96)
    quantizer = FourBitConfig(weight=name, group_size=32, weight_block="2d").quantizer("weight")
    scales = quantize(x, quantizer).scale.squeeze(-1)
    for start in range(0, rows, size):
        block = scales[start : start + size]
        assert torch.equal(block, block[:1].expand_as(block))
    assert torch.equal(quantizer(x.T.contiguous()).T, quantizer(x))
