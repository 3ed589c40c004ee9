"""GGUF files for llama.cpp and what builds on it: from a model, or from the file of llama.cpp's converter."""

from hf_stablespam.quant.export.gguf.export import export_gguf
from hf_stablespam.quant.export.gguf.repack import repack_gguf

__all__ = ["export_gguf", "repack_gguf"]
