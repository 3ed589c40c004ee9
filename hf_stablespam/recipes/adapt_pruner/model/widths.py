"""Where a model says how wide its layers are: its config, where one number is enough, else a note in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from hf_stablespam.quant.export.widths import CONFIG_KEY, text_config, unequal
from hf_stablespam.recipes.adapt_pruner.model.layers import DecoderLayer


def widths_of(layers: Sequence[DecoderLayer]) -> list[dict[str, int]]:
    """MLP neurons and key-value heads of each layer."""
    return [{"intermediate_size": layer.neurons, "kv_heads": layer.kv_heads} for layer in layers]


def note_widths(model: nn.Module, layers: Sequence[DecoderLayer]) -> None:
    """Write the widths into the model's config.

    What all layers have alike becomes the config's own number. For what differs the number stays that of the model
    before, which is an upper bound, and the note has the widths.
    """
    if not hasattr(model, "config"):
        return
    config: Any = text_config(model.config)
    widths = widths_of(layers)
    different = unequal(widths)
    if "intermediate_size" not in different:
        config.intermediate_size = widths[0]["intermediate_size"]
    if "kv_heads" not in different:
        heads = widths[0]["kv_heads"]
        config.head_dim = layers[0].head_dim  # else it would follow from the number of heads
        config.num_key_value_heads, config.num_attention_heads = heads, heads * layers[0].queries
    if different:
        setattr(config, CONFIG_KEY, widths)
    elif hasattr(config, CONFIG_KEY):
        delattr(config, CONFIG_KEY)
