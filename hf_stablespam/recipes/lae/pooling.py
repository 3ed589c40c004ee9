"""From a backbone's output to one vector for each sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

POOLS = ("cls", "mean", "last")


def pooled(output: Any, pool: str | Callable[[Any], torch.Tensor], attention_mask: torch.Tensor | None) -> torch.Tensor:
    """(batch, in_features) from what the backbone returned.

    Args:
        output: a tensor, or an output with `last_hidden_state`: (batch, tokens, width), (batch, channels, height,
            width) for "mean", or (batch, width), which stays.
        pool: "cls", "mean", "last", or a function of `output`.
        attention_mask: (batch, tokens), 1 for what is not padding.

    Raises:
        ValueError: an output without hidden states, or a feature that is not (batch, in_features).
    """
    if callable(pool):
        features = pool(output)
    else:
        hidden = output if isinstance(output, torch.Tensor) else getattr(output, "last_hidden_state", None)
        if hidden is None:
            raise ValueError(
                f"the backbone returned {type(output).__name__} without last_hidden_state; pass pool=a function of it"
            )
        features = _named(hidden, pool, attention_mask)
    if features.ndim != 2:
        raise ValueError(f"pool={pool!r} must give (batch, in_features), got the shape {tuple(features.shape)}")
    return features


def _named(hidden: torch.Tensor, pool: str, mask: torch.Tensor | None) -> torch.Tensor:
    if hidden.ndim == 2:
        return hidden
    if hidden.ndim == 4 and pool == "mean":
        return hidden.mean(dim=(2, 3))
    if pool == "cls":
        return hidden[:, 0]
    if pool == "mean":
        if mask is None:
            return hidden.mean(dim=1)
        weights = mask.to(hidden.dtype).unsqueeze(-1)
        return (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
    if mask is None:
        return hidden[:, -1]
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = (mask * positions).argmax(dim=1)  # of the right-most 1, padded on either side
    return hidden[torch.arange(len(hidden), device=hidden.device), last]
