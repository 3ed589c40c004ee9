"""Commands as they stand on the pages: run in a small form, or checked by the parsers that would read them."""

import argparse
import configparser
import contextlib
import io
import os
import re
import runpy
import shlex
import sys
from pathlib import Path
from unittest import mock

import pytest
from accelerate.state import AcceleratorState, PartialState
from packaging.requirements import Requirement
from transformers import HfArgumentParser

from hf_stablespam.__main__ import COMMANDS
from hf_stablespam.__main__ import main as hf_stablespam_main
from hf_stablespam.trainer.launcher import launch as launcher
from tests.docs.pages import ROOT
from tests.quant.export.gguf.models import write_float_gguf

# A literal "..." on a page stands for the options of the block before; these are those that a script demands.
DEMANDED = {"pretrain.py": ["--output_dir", "runs/x"], "trl": ["--model_name_or_path", "x", "--dataset_name", "y"]}
# What makes a run small enough for a test: argparse takes the last of two values, so these win. Scripts that are not
# here are parsed only: benchmarks would append to their results, tests/examples runs the other examples.
QUIET = "--report_to none --disable_tqdm True --use_cpu True"
FEW_STEPS = f"--max_steps 2 --warmup_steps 1 --per_device_train_batch_size 2 --block_size 16 {QUIET}"
SMALL = {
    "pretrain.py": f"{FEW_STEPS} --max_eval_samples 4",
    "plain_trainer.py": FEW_STEPS,
    "train.py": FEW_STEPS,
    "rescue.py": f"--smoke {QUIET}",
}
FROM_THE_HUB = {"--dataset_name", "--model_name_or_path"}  # no network: such commands are parsed only


class _Parsed(Exception):
    """Raised where a script would begin its work: its arguments have been read."""


def commands_of(block: str) -> list[list[str]]:
    """The commands of a bash block, as lists of words, without comments and without `NAME=value` in front."""
    found = []
    for line in block.replace("\\\n", " ").splitlines():
        # "<this repository>" is a placeholder and "$(which trl)" one word; the shell would see more in them.
        line = line.replace("<this repository>", "REPOSITORY").replace("$(which trl)", "trl")
        words = shlex.split(line, comments=True)
        while "&&" in words:
            found.append(words[: words.index("&&")])
            words = words[words.index("&&") + 1 :]
        found.append([word for i, word in enumerate(words) if i or not re.fullmatch(r"[A-Z_]+=.*", word)])
    return [words for words in found if words]


@contextlib.contextmanager
def accelerate_as_found():
    """TrainingArguments change the environment (--fsdp, --bf16), and through it the state of the process."""
    kept = [(state, dict(state._shared_state)) for state in (PartialState, AcceleratorState)]
    with mock.patch.dict(os.environ):
        yield
    for state, values in kept:
        state._shared_state.clear()
        state._shared_state.update(values)


class Shell:
    """Does what a page's commands say, in the present folder, as far as a test can.

    Commands of ours are run with few steps. What needs several processes, the hub or hours is only parsed: by
    torchrun's, accelerate's, TRL's or the script's own parser, up to the point where the script has its arguments.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch

    def run(self, words: list[str]) -> None:
        """Run or check one command.

        Raises:
            AssertionError, ValueError, SystemExit: something in it is not so.
        """
        program, rest = Path(words[0]).name, words[1:]
        with accelerate_as_found():
            if any(word.startswith("[") for word in rest):
                self._usage(rest if program == "hf-stablespam" else rest[2:])
            else:
                getattr(self, "_" + program.replace("-", "_"))(rest)

    def _git(self, rest: list[str]) -> None:
        assert rest == ["clone", "REPOSITORY"]

    def _cd(self, rest: list[str]) -> None:
        assert rest == ["hf_stablespam"]

    def _make(self, rest: list[str]) -> None:
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        variables = set(re.findall(r"\$\((\w+)\)", (ROOT / "Makefile").read_text()))
        for word in rest:
            assert (word.partition("=")[0] in variables) if "=" in word else (word in targets), word

    def _pip(self, rest: list[str]) -> None:
        assert rest[0] == "install"
        setup = configparser.ConfigParser()
        setup.read(ROOT / "setup.cfg")
        words = iter(rest[1:])
        for word in words:
            if word in ("-c", "-e"):
                assert (ROOT / next(words).partition("[")[0]).exists()
            else:
                wanted = Requirement(re.sub(r"^\.", "hf_stablespam", word))
                assert wanted.name == "hf_stablespam"
                assert wanted.extras <= set(setup["options.extras_require"]), wanted

    def _pre_commit(self, rest: list[str]) -> None:
        assert rest == ["install"]

    def _python(self, rest: list[str]) -> None:
        if rest[0] == "convert_hf_to_gguf.py":
            self._convert_hf_to_gguf(rest[1:])
        elif rest[0] != "-m":
            self._script(*rest)
        else:
            assert rest[1] == "hf_stablespam", rest
            self._hf_stablespam(rest[2:])

    def _hf_stablespam(self, rest: list[str], parse_only: bool = False) -> None:
        if rest[0] in COMMANDS and rest[0] != "run":
            self.patch.setattr(sys, "argv", ["hf-stablespam", *rest])
            assert hf_stablespam_main() == 0
            return
        options = launcher._parser().parse_args(rest[rest[0] == "run" :])
        script, arguments = launcher._script_and_arguments(options.command, launcher._parser())
        own = rest[: rest.index(script)]
        with self._as_found():
            launcher._four_bit_options(options.four_bit or "int4", launcher._parser())
            self._script(script, *arguments, parse_only=parse_only, launched=own)

    def _echo(self, rest: list[str]) -> None:
        text, arrow, file = rest
        assert arrow == ">"
        Path(file).write_text(text + "\n")

    def _llama_cli(self, rest: list[str]) -> None:
        assert Path(rest[rest.index("-m") + 1]).read_bytes()[:4] == b"GGUF"

    def _ollama(self, rest: list[str]) -> None:
        if rest[0] == "create":
            assert rest[2] == "-f"
            source = Path(rest[3]).read_text().split("FROM ")[1].strip()
            assert Path(source).read_bytes()[:4] == b"GGUF"
        else:
            assert rest[0] == "run"

    def _convert_hf_to_gguf(self, rest: list[str]) -> None:
        """llama.cpp's converter is on no registry; of what it writes, numbers in float16, `repack` needs no more."""
        folder, *options = rest
        assert options[::2] == ["--outtype", "--outfile"]
        write_float_gguf(Path(folder), Path(options[3]))

    def _torchrun(self, rest: list[str]) -> None:
        from torch.distributed.run import parse_args

        options = parse_args(rest)
        self._launched(options.module, options.training_script, options.training_script_args)

    def _accelerate(self, rest: list[str]) -> None:
        from accelerate.commands.config.config_args import load_config_from_file
        from accelerate.commands.launch import launch_command_parser

        assert rest[0] == "launch"
        options = launch_command_parser().parse_args(rest[1:])
        if options.config_file is not None:
            load_config_from_file(str(ROOT / options.config_file))
        self._launched(options.module, options.training_script, options.training_script_args)

    def _launched(self, module: bool, script: str, arguments: list[str]) -> None:
        if module:
            assert script == "hf_stablespam"
            self._hf_stablespam(arguments, parse_only=True)
        else:
            self._script(script, *arguments, parse_only=True)

    def _script(self, script: str, *rest: str, parse_only: bool = False, launched: list[str] | None = None) -> None:
        name = Path(script).name
        if "..." in rest:
            place, parse_only = rest.index("..."), True
            rest = (*rest[:place], *DEMANDED[name], *rest[place + 1 :])
        if name == "trl":
            self._trl(*rest)
            return
        assert Path(script).exists(), script
        self._parse(script, *rest)
        if name not in SMALL or parse_only or FROM_THE_HUB & {*rest}:
            return
        arguments = [*rest, *SMALL[name].split()]
        if launched is not None:
            assert launcher.main([*launched, script, *arguments]) == 0
        else:
            self.patch.setattr(sys, "argv", [script, *arguments])
            runpy.run_path(script, run_name="__main__")

    def _parse(self, script: str, *rest: str) -> None:
        """The script itself, until it has read its arguments."""

        def stopping(original):
            def parse(*args, **kwargs):
                original(*args, **kwargs)
                raise _Parsed

            return parse

        parsers = {argparse.ArgumentParser: "parse_args", HfArgumentParser: "parse_args_into_dataclasses"}
        # TrainingArguments refuses --bf16 where it finds neither a GPU nor the wish for none.
        on_the_cpu = ["--use_cpu", "True"] if "HfArgumentParser" in Path(script).read_text() else []
        with pytest.MonkeyPatch.context() as patch:
            for parser, method in parsers.items():
                patch.setattr(parser, method, stopping(getattr(parser, method)))
            patch.setattr(sys, "argv", [script, *rest, *on_the_cpu])
            with pytest.raises(_Parsed):
                runpy.run_path(script, run_name="__main__")

    def _trl(self, method: str, *rest: str) -> None:
        assert method == "sft"
        from trl.scripts.sft import make_parser

        make_parser().parse_args_into_dataclasses([*rest, "--use_cpu", "True"])

    def _usage(self, rest: list[str]) -> None:
        """A synopsis names the options that `--help` names."""
        command = [rest[0]] if rest[0] in COMMANDS else []
        self.patch.setattr(sys, "argv", ["hf-stablespam", *command, "--help"])
        with contextlib.redirect_stdout(io.StringIO()) as shown, pytest.raises(SystemExit):
            hf_stablespam_main()
        usage = shown.getvalue().partition("\n\n")[0].partition("[-h]")[2]
        flags = [set(re.findall(r"(?<![\w-])--?\w[\w-]*", text)) for text in (" ".join(rest), usage)]
        assert flags[0] == flags[1], flags

    @contextlib.contextmanager
    def _as_found(self):
        """The launcher changes the process that it is in, for good."""
        from transformers.trainer_callback import CallbackHandler

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(CallbackHandler, "__init__", CallbackHandler.__init__)
            patch.setattr(sys, "path", sys.path.copy())
            patch.setattr(sys, "argv", sys.argv.copy())
            patch.setenv("PYTHONPATH", str(ROOT))
            patch.setenv(launcher.ENVIRONMENT, "{}")
            yield
