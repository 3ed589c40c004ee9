"""How parameters, samples and steps are shared out over the stages."""

from __future__ import annotations

import math
from itertools import pairwise

SPLITS = ("linear", "constant", "cosine")


def stage_targets(original: int, target: int, stages: int) -> list[int]:
    """Parameters after the cut of each stage: ``P₀ − (P₀ − P*)·k // K`` for ``k`` from 1 to ``K``.

    Args:
        original: ``P₀``.
        target: ``P*``.
        stages: ``K``.

    Raises:
        ValueError: `stages` is not an integer of at least 1.

    Example:
        >>> stage_targets(100, 50, 4)
        [88, 75, 63, 50]
    """
    if isinstance(stages, bool) or not isinstance(stages, int) or stages < 1:
        raise ValueError(f"stages must be an integer of at least 1, got {stages!r}; the official runs have 5 to 20")
    return [original - (original - target) * k // stages for k in range(1, stages + 1)]


def split_data(total: int, stages: int, strategy: str = "linear") -> list[int]:
    """How many of `total` samples each stage gets; the last has the rest.

    Args:
        total: samples.
        stages: ``K``.
        strategy: ``"linear"``: ``⌊total·2k/(K(K+1))⌋``; ``"constant"``: ``⌊total/K⌋``; ``"cosine"``: up to stage ``k``
            ``⌊total·(1 − cos(kπ/2K))⌋``.

    Raises:
        ValueError: another strategy, or a stage without a sample.

    Example:
        >>> split_data(1000, 4)
        [100, 200, 300, 400]
    """
    if strategy == "linear":
        parts = [total * 2 * k // (stages * (stages + 1)) for k in range(1, stages)]
    elif strategy == "constant":
        parts = [total // stages] * (stages - 1)
    elif strategy == "cosine":
        ends = [math.floor(total * (1 - math.cos(k * math.pi / (2 * stages)))) for k in range(stages)]
        parts = [after - before for before, after in pairwise(ends)]
    else:
        raise ValueError(f"data_split must be one of {', '.join(map(repr, SPLITS))}, got {strategy!r}")
    parts.append(total - sum(parts))
    if min(parts) < 1:
        raise ValueError(f"{total} is too little for {stages} stages ({strategy}): {parts}; use fewer stages")
    return parts
