"""The first run on a GPU, rehearsed on the CPU, and without the packages that a bare machine lacks.

`make evidence-smoke` runs this, among the pieces of the other benchmarks.
"""

import csv
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

LACKING = ("datasets", "evaluate", "trl", "compressed_tensors", "bokeh", "torchao", "gguf")


def bare_environment(folder: Path) -> Path:
    """A virtual environment with what this one has, as links, but for `LACKING`; its Python."""
    venv.create(folder, symlinks=True)
    own = next(folder.glob("lib/python*/site-packages"))
    for packages in [Path(entry) for entry in sys.path if entry.endswith("site-packages")]:
        for path in packages.iterdir():
            name = path.name.partition("-")[0].partition(".")[0].lower()
            if name not in LACKING and path.suffix != ".pth" and not (own / path.name).exists():
                (own / path.name).symlink_to(path)
    return folder / "bin" / "python"


def rows(path):
    return list(csv.DictReader(path.open(newline="")))


@pytest.mark.long
def test_the_rehearsal_runs_on_a_bare_machine(tmp_path):
    pytest.importorskip("triton", reason="triton is not installed: it exists for Linux on x86_64 only")
    python, results = bare_environment(tmp_path / "bare"), tmp_path / "results"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHON": str(python), "OMP_NUM_THREADS": "1"}
    code = f"from importlib.util import find_spec; print([name for name in {LACKING!r} if find_spec(name)])"
    assert subprocess.run([python, "-c", code], env=environment, capture_output=True, check=True).stdout == b"[]\n"
    command = [str(ROOT / "benchmarks" / "gpu_check.sh"), str(results), "--rehearse"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
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
