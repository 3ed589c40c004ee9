"""The examples are scripts: their folder goes on the path, as it does when Python runs one of them."""

import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))


@pytest.fixture(scope="session", autouse=True)
def corpus_cache(tmp_path_factory):
    """One cache for all tests of a session, and none of it in the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("corpus")
        patch.setenv("HF_STABLESPAM_CACHE", str(folder))
        yield folder
