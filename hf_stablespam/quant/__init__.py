"""4-bit linear layers: formats, quantizers, the layer, and conversion of models."""

from hf_stablespam.quant._moved import find_moved_modules
from hf_stablespam.quant.config import FourBitConfig
from hf_stablespam.quant.convert import convert_from_4bit, convert_to_4bit, restore_linear
from hf_stablespam.quant.export import export_4bit, export_gguf, repack_gguf
from hf_stablespam.quant.layers.linear import FourBitLinear, fixed_weights

__all__ = [
    "FourBitConfig",
    "FourBitLinear",
    "convert_from_4bit",
    "convert_to_4bit",
    "export_4bit",
    "export_gguf",
    "fixed_weights",
    "repack_gguf",
    "restore_linear",
]

find_moved_modules()
