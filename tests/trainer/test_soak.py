"""Five thousand steps: memory does not grow, files are closed, steps do not become slower."""

from itertools import pairwise
from statistics import median

import pytest

from benchmarks._record import append_rows
from tests.trainer.soak import MEASURE_EVERY, measured

STEPS, SETTLED = 5000, 500


@pytest.mark.long
def test_five_thousand_steps(tmp_path):
    rows = [row for row in measured(tmp_path, STEPS) if row["step"] >= SETTLED]
    seconds = [(after["cpu_seconds"] - before["cpu_seconds"]) / MEASURE_EVERY for before, after in pairwise(rows)]
    quarter = len(seconds) // 4
    early, late = median(seconds[:quarter]), median(seconds[-quarter:])
    result = {
        "steps": STEPS,
        "memory_at_500_mb": round(rows[0]["memory"] / 2**20, 1),
        "memory_at_end_mb": round(rows[-1]["memory"] / 2**20, 1),
        "memory_growth": round(rows[-1]["memory"] / rows[0]["memory"] - 1, 4),
        "files_at_500": rows[0]["files"],
        "files_at_end": rows[-1]["files"],
        "step_cpu_ms_early": round(1e3 * early, 2),
        "step_cpu_ms_late": round(1e3 * late, 2),
        "step_time_drift": round(late / early - 1, 4),
    }
    append_rows("soak", [result])
    assert result["memory_growth"] < 0.01, result
    assert result["files_at_end"] <= result["files_at_500"], result
    assert abs(result["step_time_drift"]) < 0.10, result
