"""Where a model says how wide its layers are: its config, where one number is enough, else a note in it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hf_stablespam.quant.export.widths import CONFIG_KEY, text_config, unequal
from hf_stablespam.recipes.adapt_pruner.model.layers import ATTENTION, DecoderLayer

_HEADS = ("head_dim", "num_key_value_heads", "num_attention_heads")


def widths_of(layers: Sequence[DecoderLayer]) -> list[dict[str, int]]:
    """MLP neurons and key-value heads of each layer."""
    return [{"intermediate_size": layer.neurons, "kv_heads": layer.kv_heads} for layer in layers]


def note_widths(model: nn.Module, layers: Sequence[DecoderLayer]) -> None:
    """Write the widths into the model's config.

    What all layers have alike becomes the config's own number. For what differs the number stays that of the model
    before, which is an upper bound, and the note has the widths; so it is with fewer heads where the class takes the
    width of a head from their number.
    """
    if not hasattr(model, "config"):
        return
    config: Any = text_config(model.config)
    widths = widths_of(layers)
    different = unequal(widths)
    if "intermediate_size" not in different:
        config.intermediate_size = widths[0]["intermediate_size"]
    if "kv_heads" not in different:
        if builds(layers[0], with_heads := _with_heads(config, layers[0])):
            for name in _HEADS:
                setattr(config, name, getattr(with_heads, name))
        elif config.num_attention_heads != with_heads.num_attention_heads:
            different.append("kv_heads")
    if different:
        setattr(config, CONFIG_KEY, widths)
    elif hasattr(config, CONFIG_KEY):
        delattr(config, CONFIG_KEY)


def builds(layer: DecoderLayer, config: Any) -> bool:
    """Whether the class of the layer's attention makes one of the layer's present shapes from the config.

    StableLM's and Helium's divide the hidden size by the number of heads, whatever ``head_dim`` says.
    """
    try:
        with torch.device("meta"):
            built = type(layer.module.self_attn)(config, 0)
    except TypeError:  # not made as transformers makes its own: nothing is known
        return True
    except (ValueError, RuntimeError):
        return False
    return all(getattr(built, name).weight.shape == layer.linear(name).weight.shape for name in ATTENTION)


def _with_heads(config: Any, layer: DecoderLayer) -> Any:
    """A copy of the config with the number of the layer's heads, and their width, which else followed from it."""
    config = copy.deepcopy(config)
    heads = layer.kv_heads
    for name, number in zip(_HEADS, (layer.head_dim, heads, heads * layer.queries), strict=True):
        setattr(config, name, number)
    return config
