"""`hf-stablespam repack`: the command line of `repack_gguf`. Help is shown without importing torch."""

import argparse
from collections.abc import Sequence

from hf_stablespam._names import add_option
from hf_stablespam.trainer.export_command import add_gguf_options


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m hf_stablespam repack SOURCE OUTPUT [--like RUN]``."""
    parsed = _parser().parse_args(arguments)
    from hf_stablespam.quant import repack_gguf  # here, because these import torch and transformers
    from hf_stablespam.trainer.export_checkpoint import load_trained, refuse_replacing

    if parsed.like:
        refuse_replacing(parsed.like, parsed.output)
    like = load_trained(parsed.like)[0] if parsed.like else None
    repack_gguf(parsed.source, parsed.output, like, embedding=parsed.embedding, overwrite=parsed.overwrite)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-stablespam repack",
        description="Pack the matrices of a GGUF file (F16 or F32) that lie on a 4-bit grid, without any change.",
    )
    parser.add_argument("source", metavar="SOURCE", help="GGUF file in F16 or F32, from convert_hf_to_gguf.py")
    parser.add_argument("output", metavar="OUTPUT", help="GGUF file to write")
    add_option(parser, "--like", metavar="RUN", help="checkpoint or run: all of its 4-bit weights must be in the file")
    add_gguf_options(parser)
    return parser
