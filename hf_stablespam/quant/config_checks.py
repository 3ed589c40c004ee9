"""What the fields of `FourBitConfig` may say, each by itself and together."""

from __future__ import annotations

import re
from typing import Any

from hf_stablespam.quant.formats.number_formats import ScaleKind, get_format

OPERANDS = ("weight", "activation", "gradient")
CHOICES: dict[str, tuple[str | None, ...]] = {
    "gradient_rounding": ("stochastic", "nearest"),
    "hadamard": (None, "weight_grad", "all"),
    "weight_block": ("1d", "2d"),
    "adapters": ("separate", "merged"),
    "mx_scale_rule": ("even", "floor", "rceil"),
    "scale_dtype": ("bfloat16", "float16", "float32"),
}
MAX_OUTLIERS = 8

# Fields that count for nothing without another: their default, and what they need.
NEEDS = {
    "gradient_rounding": ("stochastic", "a gradient format"),
    "hadamard_size": (16, "hadamard"),
    "hadamard_seed": (0, "hadamard"),
    "weight_block": ("1d", "a weight format"),
    "weight_outliers": (0, "a weight format"),
    "adapters": ("separate", "a weight format"),
    "activation_outliers": (0, "an activation format"),
    "mx_scale_rule": ("even", "an operand in the format 'mxfp4'"),
    "four_over_six": (False, "an operand in the format 'nvfp4'"),
    "scale_dtype": ("bfloat16", "a weight whose scales are ordinary numbers"),
}


def check_formats(config: Any) -> None:
    """Raise about an unknown format, or one that is for weights only."""
    for operand in OPERANDS:
        name = getattr(config, operand)
        if name is not None and get_format(name, operand).signed and operand != "weight":
            raise ValueError(f"{operand}={name!r}: this format is for weights only; set {operand}='int4'")


def check_numbers(config: Any) -> None:
    """Raise about a number out of its range."""
    if config.group_size != "auto":
        _check_integer("group_size", config.group_size, 1, None, "128 suits packed checkpoints, 'auto' most models")
    _check_integer("keep_last_blocks", config.keep_last_blocks, 0, None, "0 keeps none")
    _check_integer("hadamard_seed", config.hadamard_seed, 0, None, "0 is as good as any")
    for field in ("activation_outliers", "weight_outliers"):
        _check_integer(field, getattr(config, field), 0, MAX_OUTLIERS, "0 keeps none")
    size = config.hadamard_size
    if type(size) is not int or size not in (16, 32, 64, 128):
        raise ValueError(f"hadamard_size must be 16, 32, 64 or 128, got {size!r}; 16 is the usual one")


def check_choices(config: Any) -> None:
    """Raise about a choice that is none of the known ones."""
    for field, known in CHOICES.items():
        value = getattr(config, field)
        if value not in known:
            names = ", ".join(repr(choice) for choice in known)
            raise ValueError(f"{field} must be one of {names}, got {value!r}; {known[0]!r} is the default")
    for field in ("four_over_six", "cache_weights", "fused"):
        if not isinstance(getattr(config, field), bool):
            raise ValueError(f"{field} must be True or False, got {getattr(config, field)!r}")


def check_together(config: Any) -> None:
    """Raise about a field that counts for nothing beside the others, or that excludes another."""
    if config.hadamard == "weight_grad" and config.gradient is None:
        raise ValueError(
            "hadamard='weight_grad' needs a gradient format, got gradient=None: the transform only serves"
            " quantized operands; set gradient='nvfp4', or hadamard=None"
        )
    if config.weight_outliers and config.weight is not None and get_format(config.weight).signed:
        raise ValueError(
            f"weight_outliers must be 0 with weight={config.weight!r}, got {config.weight_outliers}: its codes reach as"
            " far as the largest magnitude; set weight_outliers=0, or weight='int4'"
        )
    formats = [getattr(config, operand) for operand in OPERANDS]
    real = config.weight is not None and get_format(config.weight).scale is ScaleKind.REAL
    given = {
        "a gradient format": config.gradient is not None,
        "hadamard": config.hadamard is not None,
        "a weight format": config.weight is not None,
        "an activation format": config.activation is not None,
        "an operand in the format 'mxfp4'": "mxfp4" in formats,
        "an operand in the format 'nvfp4'": "nvfp4" in formats,
        "a weight whose scales are ordinary numbers": real,
    }
    for field, (default, need) in NEEDS.items():
        value = getattr(config, field)
        if value != default and not given[need]:
            operands = ", ".join(f"{operand}={name!r}" for operand, name in zip(OPERANDS, formats, strict=True))
            raise ValueError(
                f"{field}={value!r} needs {need}, got {operands}, hadamard={config.hadamard!r}: it would count for"
                f" nothing; give it one, or leave {field}={default!r}"
            )


def as_patterns(value: Any, field: str) -> tuple[str, ...] | None:
    """Names as a tuple, each of which compiles as a regular expression; None only where it has a meaning."""
    if value is None:
        return None if field == "target_modules" else ()
    names = (value,) if isinstance(value, str) else tuple(value)
    for name in names:
        try:
            re.compile(name)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"{field} must hold names or regular expressions, got {name!r} ({error}); escape special characters"
            ) from None
    return names


def _check_integer(field: str, value: Any, low: int, high: int | None, remedy: str) -> None:
    """Raise unless `value` is an integer from `low` to `high`; a bool is none."""
    if type(value) is int and value >= low and (high is None or value <= high):
        return
    allowed = f"an integer from {low} to {high}" if high is not None else f"an integer, at least {low}"
    raise ValueError(f"{field} must be {allowed}, got {value!r}; {remedy}")
