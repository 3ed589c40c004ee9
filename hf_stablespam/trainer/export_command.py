"""`hf-stablespam export`: the command line of `export_checkpoint`. Help is shown without importing torch."""

import argparse
from collections.abc import Sequence

from hf_stablespam._names import add_option

CONFIG_OPTIONS = ("weight", "group_size")


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m hf_stablespam export CHECKPOINT OUTPUT``."""
    parsed = _parser().parse_args(arguments)
    from hf_stablespam.trainer.export_checkpoint import export_with  # here, because it imports torch and transformers

    changes = {name: getattr(parsed, name) for name in CONFIG_OPTIONS if getattr(parsed, name) is not None}
    export_with(parsed.checkpoint, parsed.output, changes, parsed.dtype, parsed.leave_unpackable)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-stablespam export",
        description="Pack a checkpoint that was trained in 4 bits (compressed-tensors format).",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder written by the Trainer")
    parser.add_argument("output", metavar="OUTPUT", help="folder to write the packed checkpoint to")
    add_option(
        parser, "--weight", metavar="FORMAT", help="int4, mxfp4, nvfp4, ..., instead of the one it was trained with"
    )
    add_option(parser, "--group-size", type=int, help="group size, instead of the one it was trained with")
    add_option(parser, "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of the rest")
    add_option(
        parser,
        "--leave-unpackable",
        action="store_true",
        help="store layers that cannot be packed unpacked, do not stop",
    )
    return parser
