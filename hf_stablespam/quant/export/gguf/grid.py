"""Numbers that lie on a 4-bit grid → their codes and scales, without knowing how they were made.

A block of numbers lies on the grid if some scale makes all of them codes. The largest magnitude of the block is then
one of the codes times the scale, so that dividing it by each code in turn finds the scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_stablespam.quant.export.gguf.blocks import pack_mxfp4, pack_q4_0

INTEGER_CODES = (-8, 7, -7, 6, 5, 4, 3, 2, 1)
E2M1_EXPONENTS = (2, 1, 0, -1)
BLOCK = 32


def recover_q4_0(values: Tensor) -> Tensor | None:
    """The bytes of Q4_0 that stand for exactly `values` (..., width), float32; None if there are none."""
    return _recover(values, INTEGER_CODES, _integer_scale, _is_integer, pack_q4_0)


def recover_mxfp4(values: Tensor) -> Tensor | None:
    """The bytes of MXFP4 that stand for exactly `values` (..., width), float32; None if there are none."""
    return _recover(values, E2M1_EXPONENTS, _power_scale, _is_e2m1, pack_mxfp4)


# Name of ggml's type → what recovers it. NVFP4 is not here: the product of its two scales is rounded in a file of
# numbers, so that it cannot be told from others.
RECOVER = {"Q4_0": recover_q4_0, "MXFP4": recover_mxfp4}


def _recover(values: Tensor, candidates: tuple, scale_of, fits, packer) -> Tensor | None:
    if values.shape[-1] % BLOCK:
        return None
    blocks = values.reshape(-1, BLOCK)
    peak = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))  # with its sign
    scale = torch.ones_like(peak)
    rest = (peak != 0).nonzero()[:, 0]  # blocks without a scale so far; zeros are on every grid
    for candidate in candidates:
        trial = scale_of(peak[rest], candidate)
        # The scale as it will be stored gives the very numbers, or it is not the scale.
        found = fits(blocks[rest] / trial).all(-1) & ((blocks[rest] / trial).mul_(trial) == blocks[rest]).all(-1)
        found &= torch.isfinite(trial[:, 0])
        scale[rest[found]] = trial[found]
        rest = rest[~found]
        if not len(rest):
            break
    if len(rest):
        return None
    codes = (blocks / scale).reshape(values.shape)
    return packer(codes, scale.reshape(*values.shape[:-1], -1))


def _integer_scale(peak: Tensor, code: int) -> Tensor:
    scale = (peak / code) if code == -8 else peak.abs() / abs(code)
    half = scale.half().float()
    return torch.where(half == scale, scale, torch.nan)


def _is_integer(codes: Tensor) -> Tensor:
    return (codes == codes.round()) & (codes >= -8) & (codes <= 7)


def _power_scale(peak: Tensor, exponent: int) -> Tensor:
    _, power = torch.frexp(peak)
    return torch.ldexp(torch.ones_like(peak), (power - 1 - exponent).clamp(-126, 127))


def _is_e2m1(codes: Tensor) -> Tensor:
    doubled = codes.abs() * 2
    small = (doubled == doubled.round()) & (doubled <= 4)
    return small | (doubled == 6) | (doubled == 8) | (doubled == 12)
