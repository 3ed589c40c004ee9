"""A model trained in 4 bits → a packed 4-bit checkpoint."""

from hf_stablespam.quant.export.compressed_tensors import export_4bit

__all__ = ["export_4bit"]
