"""Five thousand steps: memory does not grow, files are closed, steps do not become slower."""

from statistics import quantiles

import pytest

from benchmarks._record import append_rows
from tests.trainer.soak import measured

STEPS, SETTLED = 5000, 500


def usual(seconds: list[float]) -> float:
    """What a step takes where nothing disturbs it: other processes make some steps slower, and none faster."""
    return quantiles(seconds, n=10)[0]


@pytest.mark.long
def test_five_thousand_steps(tmp_path):
    measurements = measured(tmp_path, STEPS)
    rows = [row for row in measurements["rows"] if row["step"] >= SETTLED]
    seconds = measurements["step_seconds"][SETTLED:]
    quarter = len(seconds) // 4
    early, late = usual(seconds[:quarter]), usual(seconds[-quarter:])
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
