"""A run killed at random points and resumed ends as the run that nobody disturbed, bit for bit."""

import pytest
import torch

from benchmarks._record import append_rows
from tests.trainer.crashes import RESULT, crash_and_resume, in_new_process


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert in_new_process(folder) == 0
    return torch.load(folder / RESULT)


def assert_survives(folder, undisturbed, crashes, seed):
    kills = list(crash_and_resume(folder, crashes, seed))
    result = torch.load(folder / RESULT)
    assert result["options"] == undisturbed["options"]
    for part in ("weights", "states", "logs"):
        torch.testing.assert_close(result[part], undisturbed[part], rtol=0, atol=0)
    return kills


@pytest.mark.slow
def test_killed_and_resumed(tmp_path, undisturbed):
    kills = assert_survives(tmp_path, undisturbed, crashes=4, seed=1)
    assert [kill["exit_code"] for kill in kills] == [-9] * 4
    assert any(kill["newest_is_half_written"] for kill in kills)


@pytest.mark.long
def test_killed_forty_times_and_resumed(tmp_path, undisturbed):
    kills = assert_survives(tmp_path, undisturbed, crashes=40, seed=2)
    append_rows("crashes", kills)
    assert sum(kill["exit_code"] == -9 for kill in kills) >= 20
    assert sum(kill["newest_is_half_written"] for kill in kills) >= 5
