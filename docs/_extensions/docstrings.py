"""What the docstrings of the package have that mkdocstrings does not read by itself."""

import re

import griffe

DIRECTIVE = re.compile(r"^ *\.\. code-block:: text\n", re.MULTILINE)  # what follows it is indented, which is enough
EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)  # the section that griffe knows is in the plural


class Docstrings(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub(r"\1Examples:", DIRECTIVE.sub("", obj.docstring.value))
