"""Codes and scales of a 4-bit weight → the bytes of ggml's blocks.

=======  ======================================================  ==============================================
type     a block                                                 value of a number
=======  ======================================================  ==============================================
Q4_0     32 numbers: float16 scale, 16 bytes of codes            ``scale · (code - 8)``
MXFP4    32 numbers: exponent, 16 bytes of codes                 ``2^(exponent - 127) · E2M1[code]``
NVFP4    64 numbers: 4 E4M3 scales, 4 times 8 bytes of codes     ``scale · E2M1[code]``, times the tensor's scale
=======  ======================================================  ==============================================

The first half of a block's (in NVFP4: of every 16 numbers') codes are the low halves of its bytes, the second half the
high ones. Every function works on the last dimension, whatever comes before it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_stablespam.quant.formats.quantizer import Quantized
from hf_stablespam.quant.formats.scales import E4M3

# Name of the format → ggml's type.
TYPES = {
    "int4": "Q4_0",
    "int4_signed": "Q4_0",
    "fp4_e1m2": "Q4_0",
    "fp4_e1m2_official": "Q4_0",
    "mxfp4": "MXFP4",
    "nvfp4": "NVFP4",
}
# Numbers of a block: rows must be a multiple of it.
BLOCK_SIZE = {"Q4_0": 32, "MXFP4": 32, "NVFP4": 64}
# Twice the magnitude of an E2M1 number → its code without the sign.
E2M1_CODES = torch.zeros(13, dtype=torch.uint8)
E2M1_CODES[[0, 1, 2, 3, 4, 6, 8, 12]] = torch.arange(8, dtype=torch.uint8)


def pack_q4_0(codes: Tensor, scale: Tensor) -> Tensor:
    """Bytes of Q4_0.

    Args:
        codes: (..., width) integers from -8 to 7, in any dtype; `width` a multiple of 32.
        scale: (..., width / 32), one for each block.

    Returns:
        uint8, (..., width / 32 · 18).

    Raises:
        ValueError: a scale that float16 cannot hold, of a block that is not zero throughout.
    """
    blocks = codes.unflatten(-1, (-1, 32))
    # A block of zeros has the smallest scale of its type, which float16 may not know; any scale serves it.
    scale = torch.where((blocks == 0).all(-1), 0.0, scale)
    half = scale.half()
    inexact = half.float() != scale.float()
    if inexact.any():
        value = float(scale[inexact][0])
        raise ValueError(f"{int(inexact.sum())} scales have no float16 form, the first is {value:g}")
    return _join(half.unsqueeze(-1).view(torch.uint8), _nibbles((blocks + 8).to(torch.uint8)))


def pack_mxfp4(codes: Tensor, scale: Tensor) -> Tensor:
    """Bytes of MXFP4.

    Args:
        codes: (..., width) E2M1 numbers; `width` a multiple of 32.
        scale: (..., width / 32) powers of two, float32.

    Returns:
        uint8, (..., width / 32 · 17).
    """
    exponent = (scale.float().contiguous().view(torch.int32) >> 23).to(torch.uint8)
    return _join(exponent.unsqueeze(-1), _nibbles(_e2m1(codes.unflatten(-1, (-1, 32)))))


def pack_nvfp4(codes: Tensor, scale: Tensor) -> Tensor:
    """Bytes of NVFP4; the scale of the whole tensor is stored beside it.

    Args:
        codes: (..., width) E2M1 numbers; `width` a multiple of 64.
        scale: (..., width / 16) E4M3 numbers, as float32.

    Returns:
        uint8, (..., width / 64 · 36).
    """
    stored = scale.to(E4M3).view(torch.uint8).unflatten(-1, (-1, 4))
    return _join(stored, _nibbles(_e2m1(codes.unflatten(-1, (-1, 4, 16)))).flatten(-2))


def pack(parts: Quantized, ggml_type: str) -> Tensor:
    """The bytes of a quantized weight (..., width) in ggml's type.

    Args:
        parts: what `quantize` returned.
        ggml_type: a key of `BLOCK_SIZE`.
    """
    codes = parts.codes.flatten(-2)[..., : parts.width]
    scale = parts.scale if parts.block_scale is None else parts.block_scale
    step = 16 if ggml_type == "NVFP4" else 32
    of_blocks = scale.expand_as(parts.codes).flatten(-2)[..., : parts.width : step]
    return {"Q4_0": pack_q4_0, "MXFP4": pack_mxfp4, "NVFP4": pack_nvfp4}[ggml_type](codes, of_blocks)


def nvfp4_scales(packed: Tensor) -> Tensor:
    """The block scales (..., width / 16), as float32, that `pack_nvfp4` stored."""
    return packed.unflatten(-1, (-1, 36))[..., :4].flatten(-2).contiguous().view(E4M3).float()


def _e2m1(codes: Tensor) -> Tensor:
    """E2M1 numbers → their 4-bit codes, with the sign as the highest bit."""
    table = E2M1_CODES.to(codes.device)
    return table[(codes.abs() * 2).long()] + (codes < 0).to(torch.uint8) * 8


def _nibbles(codes: Tensor) -> Tensor:
    """(..., n) codes from 0 to 15 → (..., n / 2) bytes."""
    low, high = codes.chunk(2, dim=-1)
    return low | (high << 4)


def _join(scales: Tensor, codes: Tensor) -> Tensor:
    """(..., blocks, bytes) of scales and of codes → (..., bytes of the row)."""
    return torch.cat([scales, codes], dim=-1).flatten(-2)
