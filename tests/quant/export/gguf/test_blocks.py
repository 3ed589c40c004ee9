"""Bytes of ggml's blocks against gguf's own reading of them, and grids recovered from numbers alone."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("gguf", reason="GGUF files need it; install the extra 'gguf'")
from gguf import GGMLQuantizationType, quants

from hf_stablespam.quant import FourBitConfig
from hf_stablespam.quant.export.gguf.blocks import TYPES, nvfp4_scales, pack, pack_q4_0
from hf_stablespam.quant.export.gguf.grid import recover_mxfp4, recover_q4_0
from hf_stablespam.quant.formats.quantizer import quantize


def read(packed: torch.Tensor, ggml_type: str) -> torch.Tensor:
    return torch.from_numpy(quants.dequantize(packed.numpy(), GGMLQuantizationType[ggml_type]))


def weight(rows: int = 48, width: int = 320) -> torch.Tensor:
    numbers = torch.randn(rows, width)
    numbers[3, 32:64] = 0.0  # a block of zeros
    numbers[4, 0] = 1000.0  # one that is zero but for a single number
    return numbers


@pytest.mark.parametrize(
    "config",
    [
        *(FourBitConfig("int4", None, group_size=size) for size in (32, 64, 128, 512)),
        FourBitConfig.gguf(),
        FourBitConfig("int4_signed", None, group_size=64, weight_block="2d"),
        FourBitConfig("fp4_e1m2", None, group_size=64),
        FourBitConfig("fp4_e1m2_official", None, group_size=32, scale_dtype="float16"),
        FourBitConfig("int4", None, group_size=32, weight_block="2d"),
        FourBitConfig("mxfp4", None),
        FourBitConfig("mxfp4", None, mx_scale_rule="floor"),
    ],
    ids=lambda config: f"{config.weight}-{config.group_size}-{config.weight_block}-{config.mx_scale_rule}",
)
def test_packed_numbers_are_those_of_the_quantizer_and_are_found_again_in_the_numbers(config) -> None:
    quantizer = config.quantizer("weight")
    parts = quantize(weight(), quantizer)
    ggml_type = TYPES[config.weight]
    expected = parts.dequantize()
    packed = pack(parts, ggml_type)
    assert torch.equal(read(packed, ggml_type), expected)
    recover = {"Q4_0": recover_q4_0, "MXFP4": recover_mxfp4}[ggml_type]
    assert torch.equal(read(recover(expected), ggml_type), expected)
    if config.scale_dtype == "bfloat16":  # its 8 bits and the code's 3 fit into float16's 11
        assert torch.equal(expected.half().float(), expected)


@pytest.mark.parametrize("four_over_six", [False, True])
def test_nvfp4_codes_and_block_scales(four_over_six: bool) -> None:
    quantizer = FourBitConfig("nvfp4", None, four_over_six=four_over_six).quantizer("weight")
    parts = quantize(weight(), quantizer)
    packed = pack(parts, "NVFP4")
    expected = (parts.codes * parts.block_scale).flatten(-2)
    assert torch.equal(read(packed, "NVFP4"), expected)
    assert torch.equal(nvfp4_scales(packed), parts.block_scale.squeeze(-1))


def test_experts_in_one_tensor_pack_like_each_alone() -> None:
    quantizer = FourBitConfig("int4", None, group_size=32).quantizer("weight")
    experts = torch.randn(3, 8, 64)
    together = pack(quantize(experts, quantizer), "Q4_0")
    assert torch.equal(together, torch.stack([pack(quantize(expert, quantizer), "Q4_0") for expert in experts]))


def test_a_scale_that_float16_does_not_hold_is_refused_except_for_zeros() -> None:
    codes = torch.zeros(1, 64)
    pack_q4_0(codes, torch.full((1, 2), 1e-38))
    codes[0, 40] = 3
    with pytest.raises(ValueError, match=r"^1 scales have no float16 form, the first is 1e-38$"):
        pack_q4_0(codes, torch.full((1, 2), 1e-38))
    with pytest.raises(ValueError, match="no float16 form"):
        pack_q4_0(codes, torch.full((1, 2), 1e6))


@pytest.mark.parametrize("recover", [recover_q4_0, recover_mxfp4])
def test_numbers_off_the_grid_are_not_packed(recover) -> None:
    torch.manual_seed(1)
    assert recover(torch.randn(4, 64).half().float()) is None
    on_grid = torch.randint(-6, 7, (4, 64)).float() * 0.5
    on_grid[2, 5] += 1e-3  # a single number
    assert recover(on_grid) is None
    assert recover(torch.zeros(4, 40)) is None  # rows that blocks do not divide


def test_ggmls_own_rounding_keeps_the_signed_grid_and_destroys_the_symmetric_one() -> None:
    numbers = weight()
    for name, kept in (("int4_signed", 1.0), ("int4", 0.3)):
        trained = FourBitConfig(name, None, group_size=32).quantizer("weight")(numbers)
        again = quants.dequantize(
            quants.quantize(trained.numpy(), GGMLQuantizationType.Q4_0), GGMLQuantizationType.Q4_0
        )
        same = float((torch.from_numpy(again) == trained).float().mean())
        assert same == 1.0 if kept == 1.0 else same < kept


def test_a_signed_scale_is_found() -> None:
    """ggml's own Q4_0: the largest magnitude is code -8, so that its scale has the other sign."""
    numbers = torch.arange(-7, 9).repeat(2).float().unsqueeze(0) * 0.25  # up to 8, which only a negative scale reaches
    assert torch.equal(read(recover_q4_0(numbers), "Q4_0"), numbers)
