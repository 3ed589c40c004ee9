"""The pages run the examples, whose folder goes on the path and whose corpus is made once per session."""

from tests.examples.conftest import corpus_cache  # noqa: F401 (a fixture that holds for this folder too)
