"""The pages of the documentation, and the fenced blocks on them."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from sybil import Document, Example
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer

ROOT = Path(__file__).parents[2]
# CONTRIBUTING, CHANGELOG and what lies in docs/_evidence are parts of the site by inclusion.
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
_FENCES = RawFencedCodeBlockLexer(re.compile(r"(?P<language>[^\n]*)\n"))


class UnknownLanguageError(Exception):
    """A block that no test reads."""


def parsed(page: Path, evaluators: Mapping[str, Callable[[Example], None]]) -> Document:
    """The page with an example for each of its fenced blocks, to be run by the evaluator of its language."""

    def blocks(document: Document):
        for region in _FENCES(document):
            region.parsed = region.lexemes["source"]
            region.evaluator = evaluators.get(region.lexemes["language"].strip(), _unknown)
            yield region

    return Document.parse(str(page), blocks)


def _unknown(example: Example) -> None:
    language = example.region.lexemes["language"]
    raise UnknownLanguageError(
        f"{example.path}:{example.line}: no test reads blocks of {language!r}; write python, bash, json, yaml, "
        "markdown or bibtex, or teach tests/docs another language"
    )
