"""``hf-stablespam repack``: the GGUF file of llama.cpp's converter → the same with its 4-bit matrices packed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from hf_stablespam.quant import repack_gguf
from hf_stablespam.quant.export.gguf.checks import EMBEDDING_TYPES
from hf_stablespam.trainer.export_checkpoint import load_trained


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m hf_stablespam repack SOURCE OUT [--like RUN]``."""
    parser = argparse.ArgumentParser(
        prog="python -m hf_stablespam repack",
        description="Pack the matrices of a GGUF file (F16 or F32) that lie on a 4-bit grid, without any change.",
    )
    parser.add_argument("source", help="GGUF file in F16 or F32, from llama.cpp's convert_hf_to_gguf.py")
    parser.add_argument("output", help="GGUF file to write")
    parser.add_argument("--like", help="checkpoint that was trained: all of its 4-bit weights must be in the file")
    parser.add_argument("--embedding", choices=EMBEDDING_TYPES, default="q8_0", help="type of embedding and head")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    options = parser.parse_args(arguments)
    like = load_trained(options.like)[0] if options.like else None
    repack_gguf(options.source, options.output, like, embedding=options.embedding, overwrite=options.overwrite)
