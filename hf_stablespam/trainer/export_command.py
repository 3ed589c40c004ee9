"""`hf-stablespam export`: the command line of `export_checkpoint`. Help is shown without importing torch."""

import argparse
from collections.abc import Sequence

from hf_stablespam._names import add_option

CONFIG_OPTIONS = ("weight", "group_size")
# An option of one target → that target.
ONLY_FOR = {"leave_unpackable": "compressed-tensors", "dtype": "compressed-tensors"}
ONLY_FOR |= {"embedding": "gguf", "overwrite": "gguf"}


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m hf_stablespam export CHECKPOINT OUTPUT``."""
    parser = _parser()
    parsed = parser.parse_args(arguments)
    for option, target in ONLY_FOR.items():
        if getattr(parsed, option) != parser.get_default(option) and parsed.to != target:
            name = "--" + option.replace("_", "-")
            parser.error(f"{name} counts for nothing with --to {parsed.to}; leave it out, or write --to {target}")
    from hf_stablespam.trainer.export_checkpoint import export_with  # here, because it imports torch and transformers

    changes = {name: getattr(parsed, name) for name in CONFIG_OPTIONS if getattr(parsed, name) is not None}
    options = {name: getattr(parsed, name) for name in ("to", "leave_unpackable", "embedding", "overwrite")}
    export_with(parsed.checkpoint, parsed.output, changes, parsed.dtype, **options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-stablespam export",
        description="Write a checkpoint that was trained in 4 bits in the format of an engine.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder written by the Trainer, or a run's")
    parser.add_argument("output", metavar="OUTPUT", help="folder, or with --to gguf file, to write to")
    targets = ("compressed-tensors", "gguf", "unpacked")
    add_option(parser, "--to", choices=targets, metavar="FORMAT", default=targets[0], help=f"{', '.join(targets)}")
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
    add_gguf_options(parser)
    return parser


def add_gguf_options(parser: argparse.ArgumentParser) -> None:
    """What a GGUF file may be written with."""
    types = ("q8_0", "f16", "f32")
    add_option(
        parser, "--embedding", metavar="TYPE", choices=types, default=types[0], help="gguf: type of embedding and head"
    )
    add_option(parser, "--overwrite", action="store_true", help="gguf: replace the output if it exists")
