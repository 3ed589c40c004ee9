"""`hf-stablespam fuse RESPONSES … -o FOLDER`: the command line. Help is shown without importing datasets."""

import argparse
import sys
from collections.abc import Sequence

from hf_stablespam._names import add_option

COLUMNS = {"prompt": "prompt", "response": "response", "source": "source", "score": "reward"}


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m hf_stablespam fuse RESPONSES … -o OUTPUT``; returns the exit status."""
    options = vars(_parser().parse_args(arguments))
    from hf_stablespam.recipes.fusechat.files import fuse_files  # here, because it imports datasets

    paths, output, any_source = (options.pop(name) for name in ("responses", "output", "any_source"))
    sys.stdout.write(f"{fuse_files(paths, output, {**options, 'same_source': not any_source})}\n{output}\n")
    return 0


def number(text: str) -> float | None:
    return None if text.lower() == "none" else float(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-stablespam fuse",
        description="Scored answers of several models → data sets for SFT and DPO, by the rules of FuseChat-3.0.",
    )
    parser.add_argument(
        "responses", nargs="+", metavar="RESPONSES", help="JSON-lines or Parquet files, a row an answer"
    )
    parser.add_argument("-o", "--output", required=True, help="folder for the two data sets; new or empty")
    limits = {
        "--min-gap": (0.01, "smallest gap of a pair, in the rewards' unit, or none"),
        "--max-gap": (0.1, "largest gap of a pair, or none"),
        "--sft-fraction": (0.4, "share of the prompts for SFT; none: all that have no pair"),
    }
    for name, (default, text) in limits.items():
        add_option(parser, name, type=number, default=default, metavar="NUMBER", help=f"{text}; default {default}")
    add_option(parser, "--pairs-per-prompt", choices=("best", "all"), default="best", help="default best")
    add_option(parser, "--any-source", action="store_true", help="pair answers of different sources too")
    add_option(parser, "--seed", type=int, default=0, help="of the draw of the prompts for SFT; default 0")
    for name, column in COLUMNS.items():
        add_option(parser, f"--{name}-key", default=column, metavar="COLUMN", help=f"default {column}")
    add_option(parser, "--correct-key", metavar="COLUMN", help="of booleans, whether an answer is right")
    return parser
