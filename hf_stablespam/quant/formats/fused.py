"""Quantize and dequantize in one Triton kernel: every number is read once and written once.

Experimental: the kernel is tested in Triton's interpreter, where it equals `quantizer.py` bit for bit; nobody has run
it on a GPU yet. `FourBitConfig(fused=True)` switches it on. What it does not cover (stochastic rounding, square
blocks, the 4-or-6 rule, float64, NVFP4's experts) goes the ordinary way. Under `torch.compile` the compiler fuses by
itself.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_stablespam.quant.formats.number_formats import ScaleKind
from hf_stablespam.quant.formats.quantizer import amax_of_each
from hf_stablespam.quant.formats.scales import SMALLEST, tensor_scale

NUMBERS_PER_PROGRAM = 4096
SCALE_MODES = {ScaleKind.REAL: 0, ScaleKind.E8M0: 1, ScaleKind.E4M3: 2}
SCALE_RULES = {"floor": 0, "even": 1, "rceil": 2}


@triton.jit
def _round_even(x):
    """To the nearest integer, ties to even, for |x| < 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _e2m1(x):
    """To the nearest E2M1 number."""
    power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    step = tl.minimum(tl.maximum(power, 1.0), 4.0) * 0.5
    return _round_even(x / step) * step  # a power of two: the division is exact


@triton.jit
def _power_of_two(peak, RULE: tl.constexpr):
    """The E8M0 scale, see `scales.power_of_two_scale`."""
    if RULE == 2:
        bits = tl.div_rn(peak, peak * 0.0 + 6.0).to(tl.int32, bitcast=True)
        exponent = (bits >> 23) + tl.where((bits & 0x7FFFFF) > 0, 1, 0)
    else:
        bits = peak.to(tl.int32, bitcast=True)
        if RULE == 1:
            bits = bits + 0x200000
        exponent = (bits >> 23) - 2
    exponent = tl.minimum(tl.maximum(exponent, 1), 254)
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def _e4m3(x):
    """To the nearest normal E4M3 number, by the bits; conversions need a recent GPU."""
    bits = tl.minimum(tl.maximum(x, 0.015625), 448.0).to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _stored(x, SCALE_BITS: tl.constexpr):
    """Rounded to what the checkpoint stores: 0 as it is, 1 bfloat16, 2 float16."""
    if SCALE_BITS == 1:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = bits.to(tl.float32, bitcast=True)
    if SCALE_BITS == 2:
        x = x.to(tl.float16).to(tl.float32)
    return x


@triton.jit
def _range_values(
    x,  # (groups, numbers)
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    ANCHOR: tl.constexpr,
    MIN_SCALE: tl.constexpr,
    SCALE_BITS: tl.constexpr,
):
    """Quantized and dequantized with a zero point, see `quantizer._quantize_range`."""
    low = tl.minimum(tl.min(x, axis=1), 0.0)[:, None]
    high = tl.maximum(tl.max(x, axis=1), 0.0)[:, None]
    scale = _stored(tl.maximum(tl.div_rn(high - low, low * 0.0 + ANCHOR), MIN_SCALE), SCALE_BITS)
    zero = tl.minimum(tl.maximum(-_round_even(tl.div_rn(low, scale)), LOWEST), HIGHEST)
    codes = _round_even(tl.div_rn(x, tl.broadcast_to(scale, x.shape)))
    return (tl.minimum(tl.maximum(codes + zero, LOWEST), HIGHEST) - zero) * scale


@triton.jit
def _scaled(
    x,  # (groups, numbers)
    peak,  # (groups, 1)
    whole_pointer,
    MODE: tl.constexpr,
    RULE: tl.constexpr,
    ANCHOR: tl.constexpr,
    MIN_SCALE: tl.constexpr,
    DIVIDE: tl.constexpr,
    SCALE_BITS: tl.constexpr,
):
    """Numbers in units of their group's scale, and the scale; every division rounds as PyTorch's does."""
    if MODE == 2:
        whole = tl.load(whole_pointer)
        block = _e4m3(tl.div_rn(tl.div_rn(peak, peak * 0.0 + ANCHOR), peak * 0.0 + whole))
        scaled = x * tl.div_rn(block * 0.0 + tl.div_rn(1.0, whole), block)
        scale = whole * block
    elif MODE == 1:
        scale = _power_of_two(peak, RULE)
        scaled = x / scale
    elif DIVIDE:
        scale = tl.maximum(peak, MIN_SCALE)
        scaled = tl.div_rn(x * ANCHOR, tl.broadcast_to(scale, x.shape))
    else:
        scale = _stored(tl.maximum(tl.div_rn(peak, peak * 0.0 + ANCHOR), MIN_SCALE), SCALE_BITS)
        scaled = tl.div_rn(x, tl.broadcast_to(scale, x.shape))
    return scaled, scale


@triton.jit
def _fake_quantize(
    x_pointer,
    out_pointer,
    whole_pointer,  # NVFP4's tensor scale
    groups,  # in all rows together
    groups_per_row,
    width,
    SIZE: tl.constexpr,  # numbers in a group
    PADDED: tl.constexpr,  # the power of two from there
    BLOCK: tl.constexpr,  # groups in a program
    MODE: tl.constexpr,
    RULE: tl.constexpr,
    FLOATING: tl.constexpr,
    ZERO_POINT: tl.constexpr,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    ANCHOR: tl.constexpr,
    MIN_SCALE: tl.constexpr,
    DIVIDE: tl.constexpr,  # the scale is the unrounded maximum over the anchor
    SCALE_BITS: tl.constexpr,
    OUTLIERS: tl.constexpr,
):
    group = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = tl.arange(0, PADDED)
    column = (group % groups_per_row)[:, None] * SIZE + inside[None, :]
    place = (group // groups_per_row)[:, None].to(tl.int64) * width + column
    mask = (group < groups)[:, None] & (inside < SIZE)[None, :] & (column < width)
    x = tl.load(x_pointer + place, mask=mask, other=0.0).to(tl.float32)
    magnitude = tl.abs(x)
    bad = tl.where((x != x) | (magnitude == float("inf")), 1, 0)
    magnitude = tl.where(x != x, float("inf"), magnitude)
    kept = magnitude < 0.0
    for _ in tl.static_range(OUTLIERS):
        found = tl.argmax(magnitude, axis=1)
        here = inside[None, :] == found[:, None]
        kept = kept | here
        bad = tl.where(here, 0, bad)
        magnitude = tl.where(here, -1.0, magnitude)
    poisoned = tl.max(bad, axis=1)[:, None] > 0
    if ZERO_POINT:
        value = _range_values(x, LOWEST, HIGHEST, ANCHOR, MIN_SCALE, SCALE_BITS)
    else:
        peak = tl.max(magnitude, axis=1)[:, None]
        scaled, scale = _scaled(x, peak, whole_pointer, MODE, RULE, ANCHOR, MIN_SCALE, DIVIDE, SCALE_BITS)
        scaled = tl.minimum(tl.maximum(scaled, LOWEST), HIGHEST)
        value = (_e2m1(scaled) if FLOATING else _round_even(scaled)) * scale
        if DIVIDE:
            value = tl.div_rn(value, value * 0.0 + ANCHOR)
    value = tl.where(poisoned, float("nan"), value)
    value = tl.where(kept, x, value)
    if out_pointer.dtype.element_ty == tl.bfloat16:
        value = _stored(value, 1)  # by the bits: Triton's interpreter truncates where a GPU rounds
    tl.store(out_pointer + place, value.to(out_pointer.dtype.element_ty), mask=mask)


def covers(x: Tensor, quantizer: Any, amax: Tensor | None = None) -> bool:
    """Whether the kernel does what `quantizer` asks for; it has one NVFP4 scale, not one for each expert."""
    special = quantizer.stochastic or quantizer.square or quantizer.four_over_six or quantizer.format.signed
    several = amax is not None and amax.numel() > 1
    return not (special or several) and x.dtype in (torch.float32, torch.bfloat16, torch.float16)


def fake_quantize(x: Tensor, quantizer: Any, amax: Tensor | None = None) -> Tensor:
    """What `quantizer(x, amax)` returns, from one kernel. See `covers`."""
    format = quantizer.format
    x = x.detach().contiguous()
    width = x.shape[-1]
    size = min(quantizer.group_size, width)
    groups_per_row = triton.cdiv(width, size)
    groups = groups_per_row * (x.numel() // width)
    padded = triton.next_power_of_2(size)
    block = max(1, NUMBERS_PER_PROGRAM // padded)
    outliers = min(quantizer.outliers, size - 1)
    if format.scale is ScaleKind.E4M3:
        if amax is None:
            amax = amax_of_each(x.view(1, -1, width), quantizer) if outliers else x.abs().amax()
        whole = tensor_scale(amax).reshape(1)
    else:
        whole = x  # never read
    out = torch.empty_like(x)
    dtype = quantizer.scale_dtype
    smallest = SMALLEST if dtype is None else torch.finfo(dtype).tiny
    divide = format.scale is ScaleKind.REAL and dtype is None and not format.zero_point
    _fake_quantize[(triton.cdiv(groups, block),)](
        *(x, out, whole, groups, groups_per_row, width),
        SIZE=size,
        PADDED=padded,
        BLOCK=block,
        MODE=SCALE_MODES[format.scale],
        RULE=SCALE_RULES[quantizer.scale_rule],
        FLOATING=format.floating,
        ZERO_POINT=format.zero_point,
        LOWEST=float(format.lowest),
        HIGHEST=float(format.highest),
        ANCHOR=float(format.anchor),
        MIN_SCALE=float(max(format.min_scale, smallest)),
        DIVIDE=divide,
        SCALE_BITS={torch.bfloat16: 1, torch.float16: 2}.get(dtype, 0),
        OUTLIERS=outliers,
    )
    return out
