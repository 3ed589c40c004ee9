"""The one way in which methods of transformers and accelerate are wrapped: once, by name, and undone by name.

Which methods those are, when and why, is listed in `docs/patches.md`; a test compares the list.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple


class Patch(NamedTuple):
    """A method that is wrapped at present."""

    owner: type
    method: str
    original: Any  # as it stood in the class, a `staticmethod` included
    inherited: bool  # the class had no such method of its own
    installed: Any
    active: list[bool]  # emptied when the patch is undone under somebody else's wrapper


_patches: dict[tuple[str, str], Patch] = {}


def patch(owner: type, method: str, wrap: Callable[[Any], Any], *, again: bool = False) -> None:
    """Put `wrap(original)` in the place of a method. Twice is harmless.

    Args:
        owner: the class.
        method: the method's name.
        wrap: takes the method as it was found and returns the function to call instead.
        again: a method that is wrapped already is wrapped anew, from the original: what was asked for last counts.
            Default: it stays as it is.
    """
    key = (owner.__qualname__, method)
    known = _patches.get(key)
    if known is not None and known.owner is owner:
        if not again:
            return
        _undo(_patches.pop(key))
    found = inspect.getattr_static(owner, method)
    is_static = isinstance(found, staticmethod)
    original = found.__func__ if is_static else found
    replacement, active = wrap(original), [True]

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return (replacement if active else original)(*args, **kwargs)

    installed = staticmethod(wrapped) if is_static else wrapped
    _patches[key] = Patch(owner, method, found, method not in vars(owner), installed, active)
    setattr(owner, method, installed)


def patched() -> list[str]:
    """What is wrapped at present, as `"Class.method"`, sorted."""
    return sorted(".".join(key) for key in _patches)


def undo_patches() -> None:
    """Put every original back. Where somebody else has wrapped ours meanwhile, ours becomes a mere call of it."""
    while _patches:
        _undo(_patches.popitem()[1])


def _undo(done: Patch) -> None:
    done.active.clear()
    if inspect.getattr_static(done.owner, done.method) is not done.installed:
        return
    if done.inherited:
        delattr(done.owner, done.method)
    else:
        setattr(done.owner, done.method, done.original)
