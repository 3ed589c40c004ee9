"""Rounding numbers to the codes of a 4-bit grid, and scales to the type that stores them."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_stablespam.quant.formats.number_formats import Format


def e2m1_step(x: Tensor) -> Tensor:
    """Distance of neighbouring E2M1 codes around `x`: ½ below 2, then 1, then 2 from 4 on."""
    # The exponent bits alone are the power of two below |x|. float32 may round float64 input up to the next power
    # of two; such a number is nearest to that power under either step.
    power = x.to(torch.float32, copy=True)
    power.view(torch.int32).bitwise_and_(0x7F800000)
    return power.clamp_(1.0, 4.0).mul_(0.5).to(x.dtype)


def round_to_codes(x: Tensor, format: Format, stochastic: bool = False) -> Tensor:
    """Round `x`, in place, to the codes of `format`: to nearest (ties to even), or stochastically.

    Args:
        x: numbers in units of their group's scale; overwritten.
        format: the grid. A zero point is added by the caller.
        stochastic: round up with the probability that makes the result unbiased, ``floor(x + u)`` with uniform
            `u`, drawn from torch's global generator of the device.

    Returns:
        `x`, holding codes; nan stays nan.
    """
    if not format.zero_point:
        x = x.clamp_(format.lowest, format.highest)
    step = e2m1_step(x) if format.floating else None
    if step is not None:
        x = x.div_(step)
    if stochastic:
        x = x.add_(torch.rand_like(x)).floor_()
    else:
        x = x.round_()
    return x if step is None else x.mul_(step)


# Bits of mantissa that are stored, and integers to see the bits of a number through.
MANTISSA_BITS = {torch.float64: 52, torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}
BITS = {torch.float64: torch.int64, torch.float32: torch.int32}


def round_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` rounded to the nearest number of `dtype`, ties to even, but in its own dtype.

    On the bits, because a compiler may leave out a cast there and back: inductor does, on purpose.

    Args:
        x: float32 or float64 numbers, zero or in the range of normal numbers of `dtype`; larger ones become infinite.
        dtype: a floating-point type.

    Example:
        >>> round_to(torch.tensor([1.001, 1.005]), torch.bfloat16)
        tensor([1.0000, 1.0078])
    """
    cut = MANTISSA_BITS[x.dtype] - MANTISSA_BITS[dtype]
    if cut <= 0:
        return x
    bits = x.contiguous().view(BITS[x.dtype])
    bits = (bits + ((1 << (cut - 1)) - 1) + ((bits >> cut) & 1)) & -(1 << cut)
    rounded = bits.view(x.dtype)
    rounded = torch.where(rounded.abs() > torch.finfo(dtype).max, rounded * torch.inf, rounded)
    return torch.where(x.isnan(), x, rounded)
