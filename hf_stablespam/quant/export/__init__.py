"""A model trained in 4 bits → a file of the engine that is to run it."""

from hf_stablespam.quant.export.compressed_tensors import export_4bit
from hf_stablespam.quant.export.gguf import export_gguf, repack_gguf
from hf_stablespam.quant.export.unpacked import export_unpacked

__all__ = ["export_4bit", "export_gguf", "export_unpacked", "repack_gguf"]
