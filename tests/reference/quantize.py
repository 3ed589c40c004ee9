"""Slow, readable quantizers: one group at a time, in float64, straight from the definitions of the formats."""

from __future__ import annotations

import math

import torch

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def nearest(value: float, levels: list[float]) -> float:
    """The level nearest to `value`; a tie goes to the level with the even index, as IEEE rounding does."""
    order = sorted(range(len(levels)), key=lambda i: (abs(levels[i] - value), i % 2))
    return levels[order[0]]


def quantize_group(group: list[float], levels: list[float], anchor: float, outliers: int = 0) -> list[float]:
    """Symmetric: ``nearest(x·anchor/max)·max/anchor``, the `outliers` largest magnitudes stay."""
    ranked = sorted(range(len(group)), key=lambda i: -abs(group[i]))
    kept = set(ranked[: min(outliers, len(group) - 1)])
    peak = max(abs(group[i]) for i in range(len(group)) if i not in kept)
    if peak == 0:
        return [x if i in kept else 0.0 for i, x in enumerate(group)]
    scaled = [x * anchor / peak for x in group]
    values = [math.copysign(nearest(min(abs(v), levels[-1]), levels), v) * peak / anchor for v in scaled]
    return [group[i] if i in kept else values[i] for i in range(len(group))]


def quantize_rows(x: torch.Tensor, size: int, levels: list[float], anchor: float, outliers: int = 0) -> torch.Tensor:
    """Every group of every row of `x` (rows, width); the last group of a row may be smaller."""
    rows = []
    for row in x.double().tolist():
        out: list[float] = []
        for start in range(0, len(row), size):
            out += quantize_group(row[start : start + size], levels, anchor, outliers)
        rows.append(out)
    return torch.tensor(rows, dtype=torch.float64)


def quantize_signed_rows(x: torch.Tensor, size: int) -> torch.Tensor:
    """``max(min(round(x / d), 7), -8) · d``, d = (number of largest magnitude, with its sign) / −8 of a group."""
    rows = []
    for row in x.double().tolist():
        out: list[float] = []
        for start in range(0, len(row), size):
            group = row[start : start + size]
            scale = max(group, key=abs) / -8
            out += [max(min(round(value / scale), 7), -8) * scale if scale else 0.0 for value in group]
        rows.append(out)
    return torch.tensor(rows, dtype=torch.float64)
