"""Functions of numbers, where a number is a tensor of any shape or one of Python's own.

The method is written once, in `formulas` and `plan`. Paths that update many tensors together run it on vectors; the
fused path on the CPU takes one tensor after the other and runs it on floats, because an operation on a 0-dimensional
tensor costs some microseconds and one on a float a twentieth of that. Here floats behave as float64 tensors do:
nothing raises, a division by zero gives ``inf`` or ``nan``.
"""

import math
from typing import Any, TypeAlias

import torch

Number: TypeAlias = Any  # Tensor | float (no int): a formula's result is of the kind of its arguments
_FLOAT = torch.finfo(torch.float64)


def where(condition: Number, yes: Number, no: Number) -> Number:
    """``yes`` where the condition holds, else ``no``; both are computed."""
    if condition is True or condition is False:
        return yes if condition else no
    return torch.where(condition, yes, no)


def constant(value: float, like: Number) -> Number:
    """A value of the kind of another."""
    return value if type(like) is float else torch.full_like(like, value)


def as_type_of(value: Number, like: Number) -> Number:
    """A value in the dtype of another."""
    return value if type(like) is float else value.to(like.dtype)


def divide(value: Number, by: Number) -> Number:
    """``value / by``, also by zero."""
    if type(by) is not float or by != 0:
        return value / by
    return math.nan if value == 0 or value != value else math.copysign(math.inf, value)


def sqrt(value: Number) -> Number:
    """``√value`` for a value ≥ 0."""
    return math.sqrt(value) if type(value) is float else value.sqrt()


def expm1(value: Number) -> Number:
    """``eˣ − 1`` for a value ≤ 0."""
    return math.expm1(value) if type(value) is float else value.expm1()


def cos(value: Number) -> Number:
    """The cosine of a finite value."""
    return math.cos(value) if type(value) is float else value.cos()


def isfinite(value: Number) -> Number:
    """Whether a value is neither infinite nor ``nan``."""
    return math.isfinite(value) if type(value) is float else value.isfinite()


def at_least(value: Number, limit: float) -> Number:
    """The larger one; ``nan`` stays."""
    if type(value) is float:
        return limit if value < limit else value
    return value.clamp(min=limit)


def at_most(value: Number, limit: float) -> Number:
    """The smaller one; ``nan`` stays."""
    if type(value) is float:
        return limit if value > limit else value
    return value.clamp(max=limit)


def range_of(value: Number) -> torch.finfo:
    """Limits of the dtype of a value."""
    return _FLOAT if type(value) is float else torch.finfo(value.dtype)
