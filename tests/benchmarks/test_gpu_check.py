"""The first run on a GPU, rehearsed on the CPU; and without the packages that a bare machine lacks."""

import csv
import os
import subprocess
import sys

import pytest

from tests.docs.pages import ROOT

LACKING = ("datasets", "evaluate", "trl", "compressed_tensors", "bokeh", "torchao", "gguf")
# Python runs this at its start: the named packages are as good as not installed.
SITE = f"""
import sys
from importlib.abc import MetaPathFinder

class Lacking(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in {LACKING!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (left out by the test)", name=name)

sys.meta_path.insert(0, Lacking())
"""


def rows(path):
    return list(csv.DictReader(path.open(newline="")))


@pytest.mark.slow
def test_the_rehearsal_runs_on_a_bare_machine(tmp_path):
    pytest.importorskip("triton", reason="triton is not installed: it exists for Linux on x86_64 only")
    site, results = tmp_path / "site", tmp_path / "results"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SITE)
    environment = {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{ROOT}", "PYTHON": sys.executable}
    command = [str(ROOT / "benchmarks" / "gpu_check.sh"), str(results), "--rehearse"]
    done = subprocess.run(
        command, env={**environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    logs = "\n".join(path.read_text()[-2000:] for path in results.glob("*.log"))
    assert [row["state"] for row in rows(results / "parts.csv")] == ["done"] * 5, logs
    files = {path.stem: rows(path) for path in results.glob("*.csv")}
    assert set(files) == {"parts", "correctness", "step", "linear", "training", "loss"}
    for name, found in files.items():
        failed = [row for row in found if row.get("passed") == "0"]
        assert not failed, (name, failed)
    checks = {row["check"] for row in files["correctness"]}
    assert {"fake quantizer, every format and dtype", "6 tensors, triton", "compiled 4-bit layer"} <= checks
    assert {row["optimizer"] for row in files["step"] if row["optimizer"]} >= {"StableSPAM(triton)", "AdamW(fused)"}
    runs = {row["run"]: float(row["loss"]) for row in files["loss"] if row.get("last")}
    assert len(runs) == 3
    for name in files:
        assert f"--- {name}" in done.stdout
    assert not any("left out by the test" in path.read_text() for path in results.glob("*.log")), logs
