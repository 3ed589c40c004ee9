"""The launcher runs scripts that know nothing of us, and tells what is wrong with its own flags."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.trainer_callback import CallbackHandler

from hf_stablespam import FourBitConfig, MomentumResetCallback
from hf_stablespam.trainer.launcher import launch as launch_module
from hf_stablespam.trainer.launcher.attach import LaunchOptions, attach_callbacks, four_bit_config
from tests.processes import run_code, run_module
from tests.trainer.helpers import tiny_trainer

ROOT = Path(__file__).parents[3]
SCRIPT = Path(__file__).parent / "plain_script.py"


def launch(*arguments, environment=None):
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, "-m", "hf_stablespam", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **(environment or {})},
    )


def training_flags(output, **more):
    flags = {
        "output_dir": output,
        "optim": "stable_spam",
        "max_grad_norm": 0,
        "max_steps": 4,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        **more,
    }
    return [text for name, value in flags.items() for text in (f"--{name}", str(value))]


def training_rows(output):
    state = json.loads((output / "trainer_state.json").read_text())
    return [row for row in state["log_history"] if "loss" in row]


@pytest.mark.slow
def test_a_script_gets_the_optimizer_and_the_callbacks(tmp_path):
    """In a process that has transformers already; those below have not. `test_launch.py` of the examples has two."""
    own = ("--four-bit", "int4", "--gradient-norms", "--reset-every", "2")
    printed, _ = run_module("hf_stablespam", *own, SCRIPT, *training_flags(tmp_path))
    assert "argv0 plain_script.py\npath0 launcher\noptimizer StableSPAM\n" in printed
    assert "layers FourBitLinear Linear\n" in printed
    rows = training_rows(tmp_path)
    assert [row["momentum/resets"] for row in rows] == [0, 1, 0, 1]
    assert all(row["gradients/norm"] > 0 for row in rows)


@pytest.mark.slow
def test_a_module_without_callbacks_and_with_spawned_workers(tmp_path, monkeypatch):
    monkeypatch.chdir(SCRIPT.parent)
    flags = training_flags(tmp_path, dataloader_num_workers=1, per_device_train_batch_size=4)
    printed, _ = run_module("hf_stablespam", "-m", "plain_script", *flags)
    assert "optimizer StableSPAM\nparameters Parameter\nlayers Linear\n" in printed
    assert not [key for key in training_rows(tmp_path)[0] if "/" in key]


@pytest.mark.slow
def test_processes_that_the_script_starts_are_reached(tmp_path):
    """And the `sitecustomize` that was there before still runs, in the launcher's process and in the child."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("print('still here')")
    (tmp_path / "parent.py").write_text(
        "import subprocess, sys\nsubprocess.run([sys.executable, *sys.argv[1:]], check=True)\n"
    )
    site = os.pathsep.join([str(tmp_path / "site"), str(ROOT)])
    target = (tmp_path / "parent.py", SCRIPT, *training_flags(tmp_path / "out"))
    done = launch("--gradient-norms", *target, environment={"PYTHONPATH": site})
    assert done.returncode == 0, done.stderr
    printed = done.stdout
    assert printed.count("still here") == 2
    assert "optimizer StableSPAM" in printed
    assert "gradients/norm" in training_rows(tmp_path / "out")[0]


def test_four_bit_takes_a_json_object_or_file(tmp_path):
    """With any field of `FourBitConfig`."""
    text = '{"weight": "int4", "group_size": 32, "modules_to_not_convert": ["lm_head", "classifier"]}'
    expected = FourBitConfig(group_size=32, modules_to_not_convert=("lm_head", "classifier"))
    assert four_bit_config(text) == expected
    (tmp_path / "four_bit.json").write_text(text)
    script = tmp_path / "script.py"
    script.write_text("import os; print(os.environ['HF_STABLESPAM_LAUNCH'])")
    for given in (text, tmp_path / "four_bit.json"):
        code = """
            import sys
            from hf_stablespam.trainer.launcher.launch import main
            try:
                main(["--four-bit", *sys.argv[1:]])
            except SystemExit:  # the script builds no Trainer
                pass
        """
        assert json.loads(run_code(code, given, script)[0])["four_bit"] == text


def test_help_names_flags_and_examples():
    done = launch("--help")
    assert done.returncode == 0
    for text in ("--four-bit FORMAT", "--gradient-norms", "--reset-every N", "$(which trl) sft"):
        assert text in done.stdout


def test_flags_after_the_script_are_the_scripts(tmp_path):
    script = tmp_path / "echo.py"
    script.write_text("import sys; print(sys.argv[1:])")
    for command in ([script], ["run", script]):
        done = launch(*command, "--gradient-norms", "-m", "--help")
        assert done.stdout == "['--gradient-norms', '-m', '--help']\n"


def test_the_scripts_exit_status_is_ours(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text("import sys; sys.exit(int(sys.argv[1]))")
    assert [launch(script, status).returncode for status in ("0", "7")] == [0, 7]


def test_a_wrong_flag_has_no_traceback():
    """`test_wrong_uses.py` has the others."""
    done = launch("nowhere.py")
    assert done.returncode == 2
    assert "SCRIPT must be an existing file, got 'nowhere.py'; give its path" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_module_that_does_not_exist():
    done = launch("-m", "no.such.module")
    assert done.returncode != 0
    assert "No module named 'no'" in done.stderr


def test_callbacks_without_a_trainer_are_an_error(tmp_path):
    script = tmp_path / "no_trainer.py"
    script.write_text("print('done')")
    done = launch("--gradient-norms", "--reset-every", "5", script)
    assert done.returncode == 2
    assert "ended without building a Trainer, so that --gradient-norms --reset-every had nothing" in done.stderr
    assert launch(script).returncode == 0


def test_attached_twice_the_last_options_count(tmp_path, monkeypatch):
    monkeypatch.setattr(CallbackHandler, "__init__", CallbackHandler.__init__)
    for every in (3, 2):
        attach_callbacks(LaunchOptions(reset_every=every, built=str(tmp_path / "built")))
    trainer = tiny_trainer(tmp_path)
    (callback,) = [cb for cb in trainer.callback_handler.callbacks if isinstance(cb, MomentumResetCallback)]
    assert callback.every == 2
    assert (tmp_path / "built").exists()


def test_a_child_that_outlives_the_launcher_makes_its_trainer(tmp_path, monkeypatch):
    """The folder in which it left word is gone; on another node it has never been there."""
    monkeypatch.setattr(CallbackHandler, "__init__", CallbackHandler.__init__)
    attach_callbacks(LaunchOptions(gradient_norms=True, built=str(tmp_path / "gone" / "built")))
    trainer = tiny_trainer(tmp_path, max_steps=1)
    trainer.train()
    assert "gradients/norm" in trainer.state.log_history[0]


def test_a_separator_of_the_script_stays_and_one_before_it_goes(tmp_path):
    script = tmp_path / "echo.py"
    script.write_text("import sys; print(sys.argv[1:])")
    for given in ([script, "--", "a", "--"], ["--", script, "--", "a", "--"], ["-m", "--", "echo", "--", "a", "--"]):
        done = launch(*given, environment={"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])})
        assert done.stdout == "['--', 'a', '--']\n", done.stderr
    for given in (["--"], ["-m"], ["run", "--"]):
        done = launch(*given)
        assert done.returncode == 2
        assert "SCRIPT is required, after the launcher's own options" in done.stderr


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python's -P is of 3.11")
def test_safe_paths_of_the_user_stay(tmp_path):
    """Under -P Python puts no folder in front of `PYTHONPATH`: the first place is the user's."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "only_here.py").write_text("")
    (tmp_path / "script.py").write_text("import only_here; print('found')")
    paths = os.pathsep.join([str(tmp_path / "mine"), str(ROOT)])
    done = launch(tmp_path / "script.py", environment={"PYTHONPATH": paths, "PYTHONSAFEPATH": "1"})
    assert done.stdout == "found\n", done.stderr


@pytest.mark.parametrize(("given", "kept"), [(None, []), ("", []), ("a:", ["a", ""]), (":a", ["", "a"])])
def test_empty_entries_of_the_path_are_the_current_folder_for_children_too(monkeypatch, given, kept):
    monkeypatch.setenv("PYTHONPATH", (given or "").replace(":", os.pathsep))  # so that it comes back
    if given is None:
        monkeypatch.delenv("PYTHONPATH")
    monkeypatch.setenv(launch_module.ENVIRONMENT, "")
    for _ in range(2):  # under a launcher, too
        launch_module._reach_children(LaunchOptions())
        assert os.environ["PYTHONPATH"].split(os.pathsep) == [str(launch_module._CHILD_SITE), *kept]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.parametrize("status", [0, 3])
def test_a_child_that_the_script_forks_leaves_the_launchers_folder(tmp_path, status):
    script = tmp_path / "forks.py"
    script.write_text(
        "import json, os, pathlib, sys\n"
        "if not (child := os.fork()):\n"
        f"    sys.exit({status})\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        "pathlib.Path(json.loads(os.environ['HF_STABLESPAM_LAUNCH'])['built']).touch()\n"  # as a Trainer does
    )
    done = launch("--gradient-norms", script)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{status}\n", "")
