"""From the extremes of a group of numbers to the scale that they share, for each way of storing scales.

Every function works on group statistics only: tensors with one entry per group, in float32 or float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_stablespam.quant.formats.rounding import round_to

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
E4M3_SMALLEST_NORMAL = 2.0**-6
# With "4 or 6" the largest block may store 1.5 times its scale, and 384 is the last E4M3 number below 448 that
# is 1.5 times another one: the tensor's scale leaves room for it.
E4M3_MAX_FOUR_OVER_SIX = 256.0
SMALLEST = torch.finfo(torch.float32).tiny
# The inverse of the product of this and the smallest E4M3 scale is still finite.
SMALLEST_TENSOR_SCALE = 2.0**-100


def poison(amax: Tensor) -> Tensor:
    """Replace every infinite `amax` by nan, so that a group with a non-finite number becomes nan as a whole.

    Without it ``inf`` would be clamped to the largest code by some formats, which hides it.
    """
    return torch.where(torch.isfinite(amax), amax, torch.nan)


def round_scale(scale: Tensor, dtype: torch.dtype | None, smallest: float = 0.0) -> Tensor:
    """`scale` rounded to what `dtype` can store, and kept away from zero.

    Args:
        scale: one scale per group.
        dtype: the type that a checkpoint stores scales in; None rounds nothing.
        smallest: lower bound; the smallest normal number of the type is one in any case.
    """
    if dtype is None:
        return scale.clamp_min(max(smallest, SMALLEST))
    floor = max(smallest, torch.finfo(dtype).tiny)
    return round_to(scale.clamp_min(floor), dtype)


def power_of_two_scale(amax: Tensor, rule: str) -> Tensor:
    """The E8M0 scale of MXFP4 (OCP microscaling): a power of two near ``amax / 6``.

    Args:
        amax: largest magnitude of each group.
        rule: ``"floor"``: ``2^(floor(log2 amax) - 2)``, as the OCP text has it, so that the largest number may be
            clipped; ``"even"``: the same after rounding `amax` to one bit of mantissa; ``"rceil"``:
            ``2^ceil(log2(amax / 6))``, never clips.
    """
    if rule == "rceil":
        mantissa, exponent = torch.frexp(amax / 6)
        exponent = exponent - (mantissa == 0.5).to(exponent.dtype)
    else:
        mantissa, exponent = torch.frexp(amax)  # mantissa in [0.5, 1)
        if rule == "even":
            exponent = exponent + (mantissa >= 0.875).to(exponent.dtype)
        exponent = exponent - 3
    # The smallest normal number, not 2^-127: a subnormal scale is flushed to zero by some devices.
    scale = torch.ldexp(torch.ones_like(amax), exponent.clamp(-126, 127))
    return torch.where(torch.isnan(amax), amax, scale)


def tensor_scale(amax: Tensor, four_over_six: bool = False) -> Tensor:
    """NVFP4's scale of the whole tensor: maps its largest magnitude to 6 times the largest FP8 number.

    It is one that a checkpoint can hold, see `readable_scale`.

    Args:
        amax: largest magnitude of the tensor, a scalar; several for as many tensors, each with a scale of its own.
        four_over_six: leave room for blocks whose maximum is mapped to 4.
    """
    largest = E4M3_MAX_FOUR_OVER_SIX if four_over_six else E4M3_MAX
    return readable_scale((amax.float() / (largest * 6.0)).clamp_min(SMALLEST_TENSOR_SCALE))


def readable_scale(whole: Tensor) -> Tensor:
    """`whole`, or a number within 0.05 % of it, whose rounded inverse gives a reader the same bfloat16 weights.

    Checkpoints store NVFP4's tensor scale as a multiplier m = 1 / whole. Training computes code · (whole · scale), a
    reader code · (scale / m), and the two may fall on either side of the middle of two bfloat16 numbers: for 14 of
    1000 maxima that are bfloat16 numbers. Such a scale is replaced by the nearest one of 12 significant bits of which
    the last is set: products with codes and block scales then lie at least 2^-18 of their size from every such middle.

    Args:
        whole: float32 scale, 0-dimensional; several are replaced or kept each by itself.
    """
    # The odd parts of all codes and of all E4M3 numbers; powers of two round nothing.
    codes = torch.arange(1.0, 4.0, 2.0, device=whole.device).unsqueeze(1)
    scales = torch.arange(1.0, 16.0, 2.0, device=whole.device)
    each = whole[..., None, None]  # beside all codes and scales
    trained, read = codes * (each * scales), codes * (scales / (1.0 / each))
    same = (round_to(trained, torch.bfloat16) == round_to(read, torch.bfloat16)).flatten(-2).all(-1)
    odd = ((whole.view(torch.int32) & -0x1000) | 0x1000).view(torch.float32)
    return torch.where(same, whole, odd)


def e4m3_scale(amax: Tensor, scale: Tensor, anchor: float) -> Tensor:
    """The FP8 scales of NVFP4's blocks, as float32 numbers on the E4M3 grid.

    Args:
        amax: largest magnitude of each block.
        scale: `tensor_scale` of the tensor.
        anchor: the code that the largest magnitude is mapped to: 6, or 4.
    """
    stored = (amax.float() / anchor / scale).clamp(E4M3_SMALLEST_NORMAL, E4M3_MAX)
    return stored.to(E4M3).float()
