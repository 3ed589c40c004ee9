"""The optimizer inside the wrappers in which callbacks get it."""

from typing import Any


def unwrap(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrappers."""
    while getattr(optimizer, "optimizer", None) is not None:
        optimizer = optimizer.optimizer
    return optimizer
