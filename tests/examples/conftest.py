"""The examples are scripts: their folder goes on the path, as it does when Python runs one of them."""

import os
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))


import corpus  # noqa: E402 (it is in that folder)


@pytest.fixture(scope="session", autouse=True)
def corpus_cache(tmp_path_factory):
    """One cache for all tests and all workers of a session, and none of it in the home folder.

    It holds the tokens of every fourth file of the library: those of all take a core 13 seconds.
    """
    with pytest.MonkeyPatch.context() as patch:
        build = corpus._build
        patch.setattr(corpus, "_build", lambda files, size: build(files[::4] if len(files) > 300 else files, size))
        base = tmp_path_factory.getbasetemp()
        folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "corpus"
        patch.setenv("HF_STABLESPAM_CACHE", str(folder))
        yield folder
