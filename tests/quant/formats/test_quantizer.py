"""The quantizers against golden data, torchao, a slow reference, and their own definitions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_stablespam.quant.config import FourBitConfig
from hf_stablespam.quant.formats.number_formats import FORMATS, ScaleKind
from hf_stablespam.quant.formats.quantizer import Quantizer, quantize
from hf_stablespam.quant.formats.rounding import round_to
from tests.reference.quantize import E2M1, quantize_rows, quantize_signed_rows

GOLDEN = load_file(Path(__file__).parents[2] / "data" / "quantizers.safetensors")
INTEGERS = [float(level) for level in range(8)]


def weights(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * 0.05


def test_int4_weights_of_the_paper_are_reproduced_bit_for_bit() -> None:
    quantizer = FourBitConfig.paper("int4").quantizer("weight")
    result = quantize(GOLDEN["int4_weight.input"], quantizer)
    assert torch.equal(result.codes.flatten(-2).to(torch.uint8), GOLDEN["int4_weight.codes"])
    assert torch.equal(result.scale.reshape(-1, 1), GOLDEN["int4_weight.scales"])
    assert torch.equal(result.zero.reshape(-1, 1), GOLDEN["int4_weight.zeros"])
    assert torch.equal(result.dequantize(), GOLDEN["int4_weight.output"])


@pytest.mark.parametrize(("preset", "name"), [("int4", "int4_activation"), ("fp4", "fp4_official")])
def test_activations_of_the_paper_are_reproduced_bit_for_bit(preset: str, name: str) -> None:
    quantizer = FourBitConfig.paper(preset).quantizer("activation")
    assert torch.equal(quantizer(GOLDEN[f"{name}.input"]), GOLDEN[f"{name}.output"])


def test_fp4_weights_of_the_paper_are_reproduced_bit_for_bit() -> None:
    quantizer = FourBitConfig.paper("fp4").quantizer("weight")
    assert torch.equal(quantizer(GOLDEN["fp4_official.input"]), GOLDEN["fp4_official.output"])


@pytest.mark.parametrize("outliers", [0, 1, 3, 8])
@pytest.mark.parametrize("width", [64, 75, 33, 5, 1])
@pytest.mark.parametrize(
    ("name", "levels", "anchor"),
    [("int4", INTEGERS, 7), ("fp4_e1m2", INTEGERS, 7), ("fp4_e1m2_official", INTEGERS[:5], 4), ("fp4_e2m1", E2M1, 6)],
)
def test_symmetric_formats_match_the_slow_reference(name, levels, anchor, width, outliers) -> None:
    x = weights(3, width).double()
    fast = Quantizer(FORMATS[name], group_size=32, outliers=outliers)(x)
    torch.testing.assert_close(fast, quantize_rows(x, 32, levels, anchor, outliers), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", FORMATS)
def test_at_most_sixteen_levels_in_each_group(name: str) -> None:
    format = FORMATS[name]
    size = format.block or 64
    values = Quantizer(format, group_size=size)(weights(4, 4096)).reshape(-1, size)
    levels = {"fp4_e1m2_official": 9, "int4": 15, "fp4_e1m2": 15}.get(name, 15 if format.floating else 16)
    counts = [len(group.unique()) for group in values]
    assert max(counts) <= levels
    # Not fewer by mistake: the codes of all groups together fill the grid.
    result = quantize(weights(4, 4096), Quantizer(format, group_size=size))
    assert len(result.codes.unique()) == levels


@pytest.mark.parametrize("name", FORMATS)
def test_the_grid_is_a_fixed_point(name: str) -> None:
    quantizer = Quantizer(FORMATS[name], group_size=FORMATS[name].block or 32, scale_dtype=None)
    once = quantizer(weights(8, 96))
    torch.testing.assert_close(quantizer(once), once, rtol=2e-6, atol=0)


@pytest.mark.parametrize("name", FORMATS)
def test_a_group_of_zeros_and_an_empty_tensor_stay(name: str) -> None:
    quantizer = Quantizer(FORMATS[name], group_size=FORMATS[name].block or 32)
    assert torch.equal(quantizer(torch.zeros(2, 64)), torch.zeros(2, 64))
    assert quantizer(torch.zeros(0, 64)).shape == (0, 64)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("outliers", [0, 2])
@pytest.mark.parametrize("name", FORMATS)
def test_non_finite_numbers_propagate(name: str, outliers: int, bad: float) -> None:
    x = weights(2, 64)
    x[1, 5] = bad
    outliers = 0 if FORMATS[name].zero_point else outliers
    result = Quantizer(FORMATS[name], group_size=FORMATS[name].block or 32, outliers=outliers)(x)
    assert not torch.isfinite(result[1, 5])
    if FORMATS[name].scale is not ScaleKind.E4M3:  # its tensor scale is shared by all groups
        assert torch.isfinite(result[0]).all()
        assert torch.isfinite(result[1, 32:]).all()


@pytest.mark.parametrize("width", [1376, 2736, 5461, 100, 3])
@pytest.mark.parametrize("name", FORMATS)
def test_the_last_group_of_a_row_may_be_smaller(name: str, width: int) -> None:
    quantizer = Quantizer(FORMATS[name], group_size=FORMATS[name].block or 128)
    x = weights(2, width)
    whole = width // quantizer.group_size * quantizer.group_size
    result = quantizer(x, x.abs().amax())
    assert result.shape == x.shape
    for part in (slice(0, whole), slice(whole, width)):
        assert torch.equal(result[:, part], quantizer(x[:, part], x.abs().amax()))


def test_a_group_away_from_zero_keeps_its_values() -> None:
    x = torch.linspace(5, 6, 32).reshape(1, 32)
    result = Quantizer(FORMATS["int4_asym"], group_size=32)(x)
    assert (result - x).abs().max() <= 6 / 15 / 2 + 1e-6


def test_a_scale_with_a_sign_takes_the_largest_magnitude_to_code_minus_eight() -> None:
    x = torch.tensor([[0.1, -0.26, 0.5, 0.8], [0.1, 0.26, -0.5, -0.8], [0.0, 0.0, 0.0, 0.0], [0.8, -0.8, 0.1, 0.35]])
    result = quantize(x, Quantizer(FORMATS["int4_signed"], group_size=4))
    assert result.codes[:, 0].tolist() == [[-1, 3, -5, -8], [1, 3, -5, -8], [0, 0, 0, 0], [7, -8, 1, 4]]
    torch.testing.assert_close(result.scale.flatten()[[0, 1, 3]], torch.tensor([-0.1, 0.1, 0.1]))
    expected = quantize_signed_rows(weights(8, 96), 32)
    torch.testing.assert_close(Quantizer(FORMATS["int4_signed"], group_size=32)(weights(8, 96)).double(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_are_rounded_as_the_checkpoint_stores_them(dtype: torch.dtype) -> None:
    for name in ("int4", "int4_asym", "fp4_e2m1"):
        result = quantize(weights(8, 256), Quantizer(FORMATS[name], group_size=64, scale_dtype=dtype))
        assert torch.equal(result.scale.to(dtype).float(), result.scale)
        assert result.divisor == 1


@pytest.mark.parametrize("name", ["int4", "int4_asym", "nvfp4"])
def test_dequantizing_leaves_the_codes_alone(name: str) -> None:
    result = quantize(weights(4, 64), Quantizer(FORMATS[name], group_size=FORMATS[name].block or 32, outliers=1))
    codes = result.codes.clone()
    assert torch.equal(result.dequantize(), result.dequantize())
    assert torch.equal(result.codes, codes)


def test_outliers_are_kept_and_do_not_enter_the_scale() -> None:
    x = weights(4, 64)
    x[:, 7], x[:, 40] = 50.0, -80.0
    quantizer = Quantizer(FORMATS["int4"], group_size=64, outliers=2)
    result = quantizer(x)
    assert torch.equal(result[:, [7, 40]], x[:, [7, 40]])
    plain = x.clone()
    plain[:, [7, 40]] = 0
    rest = [i for i in range(64) if i not in (7, 40)]
    assert torch.equal(result[:, rest], Quantizer(FORMATS["int4"], group_size=64)(plain)[:, rest])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("source", [torch.float32, torch.float64])
def test_rounding_on_the_bits_is_that_of_a_cast(source: torch.dtype, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    info = torch.finfo(dtype)
    random = torch.randn(4000) * 10.0 ** torch.randint(-4, 5, (4000,))
    random = random[random.abs() > info.tiny].to(source)  # torch casts float64 by way of float32
    ties = torch.arange(1, 64, dtype=source) / 64 * info.eps + 1  # among them the middle of two numbers
    edges = torch.tensor([0.0, -0.0, info.tiny, info.max, -info.max, torch.inf, -torch.inf, torch.nan], dtype=source)
    beyond = torch.tensor([1.0001 * info.max, -2.0 * info.max], dtype=torch.float64).to(source)
    for x in (random, ties, edges, beyond):
        assert torch.equal(round_to(x, dtype).nan_to_num(nan=1.5), x.to(dtype).to(source).nan_to_num(nan=1.5))
