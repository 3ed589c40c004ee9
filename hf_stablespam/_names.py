"""Public names that are imported when first used, options of commands, and errors that name the nearest known name."""

import argparse
import difflib
import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """`" (did you mean 'clip_beta'?)"` where one of `known` is close to `name`, `""` where none is.

    Args:
        name: what was written.
        known: what could have been meant.
        cutoff: how close it has to be, from 0 (anything) to 1 (the same).
    """
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f" (did you mean {found[0]!r}?)" if found else ""


def lazy_attributes(
    module: str, locations: Mapping[str, str]
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """The module functions `__getattr__` and `__dir__` (PEP 562) that import public names when first used.

    Args:
        module: the importing module's `__name__`.
        locations: public name → the module that defines it.
    """

    def __getattr__(name: str) -> object:
        if name in locations:
            return getattr(importlib.import_module(locations[name]), name)
        raise AttributeError(f"module {module!r} has no attribute {name!r}{nearest(name, locations)}")

    def __dir__() -> list[str]:
        return sorted({*importlib.import_module(module).__dict__, *locations})

    return __getattr__, __dir__


def add_option(parser: argparse.ArgumentParser, name: str, **how: Any) -> None:
    """`parser.add_argument` for an option with hyphens, which is also taken, unmentioned, with underscores.

    Args:
        parser: what to add it to.
        name: the option as it is shown, such as `"--group-size"`.
        how: as for `add_argument`.
    """
    parser.add_argument(name, **how)
    other = "--" + name[2:].replace("-", "_")
    if other != name:
        parser.add_argument(other, **{**how, "help": argparse.SUPPRESS})
