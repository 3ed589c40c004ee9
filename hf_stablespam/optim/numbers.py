"""Functions of numbers, where a number is a tensor of any shape or one of Python's own.

The method is written once, in `formulas` and `plan`. Paths that update many tensors together run it on vectors; the
fused path on the CPU takes one tensor after the other and runs it on floats, because an operation on a 0-dimensional
tensor costs some microseconds and one on a float a twentieth of that. Here floats behave as float64 tensors do:
nothing raises, a division by zero gives ``inf`` or ``nan``.
"""

import math
from typing import Any, TypeAlias

import torch
from torch import Tensor

Number: TypeAlias = Any  # Tensor | float: a formula's result is of the kind of its arguments


def where(condition: Number, yes: Number, no: Number) -> Number:
    """``yes`` where the condition holds, else ``no``; both are computed."""
    if isinstance(condition, Tensor):
        return torch.where(condition, yes, no)
    return yes if condition else no


def constant(value: float, like: Number) -> Number:
    """A value of the kind of another."""
    return torch.full_like(like, value) if isinstance(like, Tensor) else value


def as_type_of(value: Number, like: Number) -> Number:
    """A value in the dtype of another."""
    return value.to(like.dtype) if isinstance(value, Tensor) else value


def divide(value: Number, by: Number) -> Number:
    """``value / by``, also by zero."""
    if isinstance(by, Tensor) or by != 0:
        return value / by
    return math.nan if value == 0 or value != value else math.copysign(math.inf, value)


def sqrt(value: Number) -> Number:
    """``√value`` for a value ≥ 0."""
    return value.sqrt() if isinstance(value, Tensor) else math.sqrt(value)


def expm1(value: Number) -> Number:
    """``eˣ − 1`` for a value ≤ 0."""
    return value.expm1() if isinstance(value, Tensor) else math.expm1(value)


def cos(value: Number) -> Number:
    """The cosine of a finite value."""
    return value.cos() if isinstance(value, Tensor) else math.cos(value)


def isfinite(value: Number) -> Number:
    """Whether a value is neither infinite nor ``nan``."""
    return value.isfinite() if isinstance(value, Tensor) else math.isfinite(value)


def at_least(value: Number, limit: float) -> Number:
    """The larger one; ``nan`` stays."""
    if isinstance(value, Tensor):
        return value.clamp(min=limit)
    return limit if value < limit else value


def at_most(value: Number, limit: float) -> Number:
    """The smaller one; ``nan`` stays."""
    if isinstance(value, Tensor):
        return value.clamp(max=limit)
    return limit if value > limit else value


def range_of(value: Number) -> torch.finfo:
    """Limits of the dtype of a value."""
    return torch.finfo(value.dtype if isinstance(value, Tensor) else torch.float64)
