"""4-bit numbers: the grids, their scales, rounding to them. A new format is an entry of `FORMATS`."""

from hf_stablespam.quant.formats.number_formats import FORMATS, Format, ScaleKind, get_format

__all__ = ["FORMATS", "Format", "ScaleKind", "get_format"]
