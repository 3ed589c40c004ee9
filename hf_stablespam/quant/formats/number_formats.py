"""What the 4-bit number formats are, as data.

A format is a grid of at most 16 codes, and a rule for the scale that a group of numbers shares.
Nothing in this file computes: `quantizer.py` reads these records, so that a new format is a new row.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from hf_stablespam._names import nearest


class ScaleKind(Enum):
    """How a group's scale is stored, which decides how it is rounded."""

    REAL = "real"  # one floating-point number per group
    E8M0 = "e8m0"  # a power of two per group (OCP microscaling)
    E4M3 = "e4m3"  # an FP8 number per group, times one float32 number per tensor (NVFP4)


@dataclass(frozen=True)
class Format:
    """A 4-bit number format.

    A value is ``code * scale``, or ``(code - zero) * scale`` with a zero point.

    Args:
        name: the name used in `FourBitConfig`.
        lowest, highest: the smallest and the largest code.
        anchor: the code that the largest magnitude of a group is mapped to.
        floating: the codes are those of E2M1 (0, ½, 1, 1½, 2, 3, 4, 6), not the integers.
        signed: the scale has a sign, so that the number of largest magnitude is mapped to the anchor whatever its sign:
            all 16 codes are used. For weights only.
        zero_point: the group's range is ``[min, max]`` and the code of zero is stored.
        block: group size fixed by the format; None leaves it to `FourBitConfig.group_size`.
        scale: how the scale is stored.
        min_scale: scales are not smaller than this (the paper's code uses 1e-5 with a zero point).
        packing: the compressed-tensors format that can hold it; None when there is none.
    """

    name: str
    lowest: float
    highest: float
    anchor: float
    floating: bool = False
    signed: bool = False
    zero_point: bool = False
    block: int | None = None
    scale: ScaleKind = ScaleKind.REAL
    min_scale: float = 0.0
    packing: str | None = None


FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        Format("int4", -8, 7, anchor=7, packing="pack-quantized"),
        Format("int4_asym", 0, 15, anchor=15, zero_point=True, min_scale=1e-5, packing="pack-quantized"),
        # ggml's own grid: it survives a requantisation to Q4_0, and is 1 dB better than the symmetric one.
        Format("int4_signed", -8, 7, anchor=-8, signed=True, packing="pack-quantized"),
        # One exponent bit and two of mantissa: 0, ¼, …, 1¾ are equally spaced, so the codes are integers.
        Format("fp4_e1m2", -7, 7, anchor=7, packing="pack-quantized"),
        # The official code of the paper maps to nine levels: 0, ±¼, ±½, ±¾ and ±1 of the largest magnitude.
        Format("fp4_e1m2_official", -4, 4, anchor=4, packing="pack-quantized"),
        Format("fp4_e2m1", -6, 6, anchor=6, floating=True),
        Format("mxfp4", -6, 6, anchor=6, floating=True, block=32, scale=ScaleKind.E8M0, packing="mxfp4-pack-quantized"),
        Format("nvfp4", -6, 6, anchor=6, floating=True, block=16, scale=ScaleKind.E4M3, packing="nvfp4-pack-quantized"),
    )
}


def get_format(name: str, field: str = "format") -> Format:
    """The format called `name`.

    Args:
        name: one of the keys of `FORMATS`.
        field: the option that the name was given to, for the error message.

    Raises:
        ValueError: the name is not known; the message lists those that are.

    Example:
        >>> get_format("int4").highest
        7
    """
    if isinstance(name, str) and name in FORMATS:
        return FORMATS[name]
    raise ValueError(
        f"{field} must be one of {', '.join(map(repr, FORMATS))} or None, got {name!r}{nearest(str(name), FORMATS)};"
        " None leaves this operand in high precision"
    )
