"""Run any training script, unchanged, with `stable_spam` registered and the callbacks that flags ask for.

The script runs in this very process, as `python SCRIPT` would run it. Processes that it starts (`torchrun`,
`accelerate launch`, TRL's command line) find `child_site/sitecustomize.py` on their `PYTHONPATH` and read what to do
from an environment variable.
"""

import argparse
import json
import os
import runpy
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from hf_stablespam._names import add_option
from hf_stablespam.trainer.launcher.attach import LaunchOptions, attach_callbacks, four_bit_config
from hf_stablespam.trainer.registration import register

ENVIRONMENT = "HF_STABLESPAM_LAUNCH"
_CHILD_SITE = Path(__file__).parent / "child_site"

_DESCRIPTION = """\
Run a training script, unchanged: --optim stable_spam becomes one of its choices, and the flags below attach callbacks
to its Trainer. Options of the launcher come before the script, everything after it belongs to the script."""

_EXAMPLES = """\
examples:
  python -m hf_stablespam train.py --optim stable_spam --max_grad_norm 0
  python -m hf_stablespam --four-bit int4 --gradient-norms train.py --optim stable_spam --max_grad_norm 0
  python -m hf_stablespam --four-bit '{"weight": "int4", "group_size": 32}' train.py --optim stable_spam
  python -m hf_stablespam -m package.train --optim stable_spam
  python -m hf_stablespam $(which trl) sft --optim stable_spam
  torchrun --nproc_per_node 2 -m hf_stablespam train.py --optim stable_spam

other commands, each with its own --help:
  python -m hf_stablespam report RUN [RUN ...]       compare runs in one HTML file
  python -m hf_stablespam export CHECKPOINT OUTPUT   write a packed 4-bit checkpoint
  python -m hf_stablespam repack SOURCE OUTPUT       pack a GGUF file of llama.cpp's converter without any change
  python -m hf_stablespam fuse RESPONSES -o OUTPUT   scored answers of several models as data for SFT and DPO
  python -m hf_stablespam run SCRIPT                 the same as without `run`, for a script called `report`"""


def main(arguments: list[str] | None = None) -> int:
    """Run a script as the command line `arguments` say (default: those of this process).

    Returns:
        0; where the script ends with a status of its own, `SystemExit` carries that.
    """
    parser = _parser()
    if not (sys.argv[1:] if arguments is None else arguments):
        parser.print_help()
        return 0
    parsed = parser.parse_args(arguments)
    four_bit = None if parsed.four_bit is None else _four_bit_options(parsed.four_bit, parser)
    options = LaunchOptions(four_bit, parsed.gradient_norms, parsed.reset_every)
    script, own = _script_and_arguments(parsed.command, parser)
    if not parsed.module and not os.path.exists(script):
        parser.error(
            f"SCRIPT must be an existing file, got {script!r}; give its path ($(which NAME) for an installed "
            "command), or -m MODULE"
        )
    process = os.getpid()
    with _temporary_folder() as folder:
        options = replace(options, built=str(Path(folder) / "built"))
        _reach_children(options)
        prepare(options)
        _run(script, own, is_module=parsed.module)
        if os.getpid() != process:  # a child that the script forked has ended, not the script
            return 0
        if options.flags and not Path(options.built).exists() and not {"-h", "--help"} & {*own}:
            parser.exit(
                2,
                f"hf_stablespam: {script} ended without building a Trainer, so that {' '.join(options.flags)} "
                "had nothing to attach to; remove the flag, or launch the script that trains\n",
            )
    return 0


def prepare(options: LaunchOptions) -> None:
    """Register the optimizer, and attach the callbacks to every Trainer that this process will build."""
    register()
    attach_callbacks(options)


def prepare_child() -> None:
    """The same in a process that the script started, from the environment; nothing where that is not set."""
    text = os.environ.get(ENVIRONMENT)
    if text:
        prepare(LaunchOptions(**json.loads(text)))


@contextmanager
def _temporary_folder() -> Iterator[str]:
    """A folder that is removed at the end of the block, but not by a child that was forked inside of it."""
    process, folder = os.getpid(), tempfile.mkdtemp()
    try:
        yield folder
    finally:
        if os.getpid() == process:
            shutil.rmtree(folder, ignore_errors=True)


def _script_and_arguments(command: list[str], parser: argparse.ArgumentParser) -> tuple[str, list[str]]:
    """The script and what is its own, a `--` among it; one before the script ends the launcher's options."""
    command = command[1:] if command[:1] == ["--"] else command
    if not command:
        parser.error("SCRIPT is required, after the launcher's own options; --help shows examples")
    return command[0], command[1:]


def _reach_children(options: LaunchOptions) -> None:
    os.environ[ENVIRONMENT] = json.dumps(asdict(options))
    present = os.environ.get("PYTHONPATH")
    paths = present.split(os.pathsep) if present else []  # an empty one among them is the current folder
    own = str(_CHILD_SITE)
    os.environ["PYTHONPATH"] = os.pathsep.join([own, *(path for path in paths if path != own)])


def _run(script: str, arguments: list[str], *, is_module: bool) -> None:
    """Run `script` as `python` would; an exit with status 0 counts as a return."""
    sys.argv = [script, *arguments]
    if not getattr(sys.flags, "safe_path", sys.flags.isolated):  # then Python puts no folder of its own in front
        sys.path[0] = os.getcwd() if is_module else str(Path(script).resolve().parent)
    try:
        if is_module:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code not in (None, 0):
            raise


def _four_bit_options(text: str, parser: argparse.ArgumentParser) -> str:
    """What `--four-bit` asks for, complete: a file's text takes its place, as a child may not find it."""
    try:
        text = Path(text).read_text() if text.endswith(".json") else text
        four_bit_config(text)
    except OSError as error:
        parser.error(f"--four-bit must be a format, a JSON object or a .json file, got {text!r}: {error.strerror}")
    except (ValueError, TypeError) as error:
        parser.error(f"--four-bit: {error}")
    return text


def _version() -> str:
    from hf_stablespam import __version__

    return __version__


def _interval(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}; leave it out for no resets")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hf_stablespam",
        usage="%(prog)s [-h] [--version] [--four-bit FORMAT] [--gradient-norms] [--reset-every N] [-m] SCRIPT"
        " [ARGS ...]",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"hf_stablespam {_version()}")
    add_option(
        parser,
        "--four-bit",
        metavar="FORMAT",
        help="train the linear layers with 4-bit weights and activations: int4, int4_asym, int4_signed, fp4_e1m2, "
        "fp4_e2m1, mxfp4, nvfp4; or fields of FourBitConfig as a JSON object or in a .json file",
    )
    add_option(
        parser,
        "--gradient-norms",
        action="store_true",
        help="log gradient norms, and with stable_spam the clipped entries",
    )
    add_option(
        parser,
        "--reset-every",
        metavar="N",
        type=_interval,
        help="reset the optimizer's moments every N update steps",
    )
    parser.add_argument("-m", dest="module", action="store_true", help="SCRIPT is the name of a module")
    # One positional: the first of two would take a `--` that is the script's.
    parser.add_argument(
        "command",
        metavar="SCRIPT [ARGS ...]",
        nargs=argparse.REMAINDER,
        help="the script to run, or with -m the module, and the script's own arguments",
    )
    return parser
