"""The examples are scripts: their folder goes on the path, as it does when Python runs one of them."""

import os
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))


@pytest.fixture(scope="session", autouse=True)
def corpus_cache(tmp_path_factory):
    """One cache for all tests and all workers of a session, and none of it in the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        base = tmp_path_factory.getbasetemp()
        folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "corpus"
        patch.setenv("HF_STABLESPAM_CACHE", str(folder))
        yield folder
