"""`optim="stable_spam"` behaves like a name of transformers' own."""

import copy
import dataclasses
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.training_args import OptimizerNames

import hf_stablespam
from tests.processes import run_code
from tests.trainer.helpers import arguments

VALUES = [member.value for member in OptimizerNames]


def run_python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_is_a_member_of_the_enum():
    member = OptimizerNames("stable_spam")
    assert member is OptimizerNames.STABLE_SPAM
    assert member is OptimizerNames["STABLE_SPAM"]
    assert member == "stable_spam"
    assert (member.name, member.value) == ("STABLE_SPAM", "stable_spam")
    assert isinstance(member, OptimizerNames)
    assert VALUES[-1] == "stable_spam"
    with pytest.raises(ValueError, match="stable_spamm"):
        OptimizerNames("stable_spamm")


def test_registering_again_changes_nothing():
    from transformers import Trainer

    before = Trainer.get_optimizer_cls_and_kwargs, Trainer.create_scheduler, list(OptimizerNames)
    hf_stablespam.register()
    hf_stablespam.register()
    assert (Trainer.get_optimizer_cls_and_kwargs, Trainer.create_scheduler, list(OptimizerNames)) == before
    assert VALUES.count("stable_spam") == 1


def test_command_line_and_help(tmp_path):
    parser = HfArgumentParser(TrainingArguments)
    (args,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--optim", "stable_spam"])
    assert args.optim is OptimizerNames.STABLE_SPAM
    assert "stable_spam" in parser.format_help()


def test_json_and_yaml_round_trips(tmp_path):
    args = arguments(tmp_path, optim_args="reset_interval=500")
    (tmp_path / "args.json").write_text(args.to_json_string())
    parser = HfArgumentParser(TrainingArguments)
    short = {"output_dir": str(tmp_path), "optim": args.to_dict()["optim"], "optim_args": args.optim_args}
    (tmp_path / "args.yaml").write_text(yaml.safe_dump(short))
    for (read,) in (
        parser.parse_dict(short),
        parser.parse_yaml_file(str(tmp_path / "args.yaml")),
    ):
        assert read.optim is OptimizerNames.STABLE_SPAM
        assert read.optim_args == "reset_interval=500"
    assert '"optim": "stable_spam"' in (tmp_path / "args.json").read_text()


def test_copies_keep_the_member(tmp_path):
    args = arguments(tmp_path)
    assert copy.deepcopy(args).optim is args.optim
    assert copy.copy(args).optim is args.optim
    assert dataclasses.replace(args, learning_rate=1.0).optim is args.optim


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_as_a_plain_string(protocol):
    assert type(pickle.loads(pickle.dumps(OptimizerNames.STABLE_SPAM, protocol))) is str
    assert pickle.loads(pickle.dumps(OptimizerNames.SGD, protocol)) is OptimizerNames.SGD


def test_training_args_open_without_the_plugin(tmp_path):
    torch.save(arguments(tmp_path), tmp_path / "training_args.bin")
    code = """
        import sys, torch
        args = torch.load(sys.argv[1], weights_only=False)
        assert "hf_stablespam" not in sys.modules
        print(args.optim)
    """
    assert run_code(code, tmp_path / "training_args.bin")[0] == "stable_spam\n"


def test_importing_the_package_loads_neither_torch_nor_transformers():
    code = """
        import sys, hf_stablespam
        print({"torch", "transformers", "numpy"} & set(sys.modules))
    """
    assert run_python(code) == "set()\n"


@pytest.mark.parametrize("transformers_is_first", [False, True])
def test_is_registered_whichever_is_imported_first(transformers_is_first):
    """And the source of a module that was hooked is still found, as debuggers and `torch.compile` need it."""
    code = f"""
        import inspect, sys
        if not {transformers_is_first}:
            for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
                del sys.modules[name]
        print("transformers.trainer" in sys.modules)
        import hf_stablespam, transformers.trainer
        from transformers import Trainer, TrainingArguments
        assert "class Trainer" in inspect.getsource(Trainer)
        args = TrainingArguments("out", optim="stable_spam", report_to=[], max_grad_norm=0)
        print(Trainer.get_optimizer_cls_and_kwargs(args)[0].__name__)
    """
    lines = run_code(code)[0].splitlines()  # wandb's among them
    assert (lines[0], lines[-1]) == (str(transformers_is_first), "StableSPAM")
