"""The Python blocks of a page as one script: `python_blocks.py PAGE [--until HEADING]` prints it."""

import argparse
import re
from pathlib import Path


def python_blocks(page: Path, until: str | None = None) -> str:
    """The page's Python blocks from top to bottom, up to the heading that begins with `until`."""
    text = page.read_text()
    if until is not None:
        text, found, _ = text.partition(f"\n## {until}")
        assert found, f"{page} has no heading that begins with {until!r}"
    return "\n\n".join(re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("--until")
    parsed = parser.parse_args()
    print(python_blocks(parsed.page, parsed.until))
