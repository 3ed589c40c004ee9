"""Attention with a prefix among keys and values: two calls of the model's own attention function."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

_POSITION = 1  # the prefix stands after the first token (CLS); for the output any place would do
_FUNCTIONS = ("sdpa", "eager")


@dataclass
class Prefix:
    """What one attention module is given for one call."""

    key: torch.Tensor  # (tokens, key_value_heads * head_dim)
    value: torch.Tensor  # the same
    compensate: bool
    function: str | None  # the attention function that the model asks for
    used: bool = False


def prefix_attention(
    module: nn.Module,
    query: torch.Tensor,  # (batch, heads, queries, head_dim)
    key: torch.Tensor,  # (batch, key_value_heads, keys, head_dim)
    value: torch.Tensor,  # the same
    attention_mask: torch.Tensor | None,  # (batch or 1, heads or 1, queries, keys)
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention with the prefix that stands in `module.calibrated_prefix`, as transformers calls its functions.

    Compensated, a query's output is that of the softmax over all columns with the prefix's values at 0, plus that of
    the softmax over the prefix alone: dividing a softmax's weights by their sum over some columns is the softmax over
    these columns.
    """
    prefix: Prefix = module.calibrated_prefix  # type: ignore[assignment]
    prefix.used = True
    function = _attention_function(module, prefix.function)
    own_key, own_value = _as_heads(prefix.key, key), _as_heads(prefix.value, value)
    others = torch.zeros_like(own_value) if prefix.compensate else own_value
    mask = _widened(module, query, key, attention_mask, own_key.shape[2], options.pop("is_causal", None))
    options["is_causal"] = False  # the mask says everything
    output, weights = function(module, query, _insert(key, own_key), _insert(value, others), mask, **options)
    if not prefix.compensate:
        return output, weights
    added, own_weights = function(module, query, own_key, own_value, None, **options)
    if weights is not None and own_weights is not None:
        before, _, after = weights.tensor_split((_POSITION, _POSITION + own_key.shape[2]), dim=-1)
        weights = torch.cat((before, own_weights, after), dim=-1)
    return output + added, weights


def _attention_function(module: nn.Module, name: str | None) -> Callable[..., Any]:
    if name not in (*_FUNCTIONS, None):
        raise ValueError(
            f"a prefix works with attn_implementation {' or '.join(_FUNCTIONS)}, got {name!r}; "
            "call model.set_attn_implementation('sdpa')"
        )
    if name == "sdpa":
        return AttentionInterface()[name]
    return sys.modules[type(module).__module__].eager_attention_forward  # each model's file has its own


def _as_heads(tokens: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(tokens, heads * head_dim) → (batch, heads, tokens, head_dim), in the dtype of `like`."""
    batch, heads, _, head_dim = like.shape
    return tokens.to(like.dtype).view(-1, heads, head_dim).transpose(0, 1).expand(batch, -1, -1, -1)


def _insert(tensor: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    return torch.cat((tensor[:, :, :_POSITION], own, tensor[:, :, _POSITION:]), dim=2)


def _widened(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    tokens: int,
    is_causal: bool | None,
) -> torch.Tensor | None:
    """The mask with columns for the prefix, which every query may see; what `is_causal` only implied is written out."""
    queries, keys = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    if mask is None:
        if not causal or queries == 1:
            return None
        mask = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    mask = mask[..., :keys]
    open_columns = mask.new_full((*mask.shape[:-1], tokens), 1 if mask.dtype == torch.bool else 0)
    return torch.cat((mask[..., :_POSITION], open_columns, mask[..., _POSITION:]), dim=-1)
