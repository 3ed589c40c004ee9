"""What llama.cpp must know of a model's configuration, as the metadata of a GGUF file, and what it cannot be told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hf_stablespam.quant.export.gguf.rope import NO_REMEDY, check_rope, rope_parameters, yarn_of
from hf_stablespam.quant.export.widths import Widths, head_width, layer_widths

if TYPE_CHECKING:
    from hf_stablespam.quant.export.gguf.architectures import Architecture


def check_configuration(config: Any, architecture: Architecture, widths: Widths) -> None:
    """Raise about what of `config` llama.cpp's architecture has not.

    Args:
        config: of the model.
        architecture: its row of the table.
        widths: of the model's layers.

    Raises:
        ValueError: a field has a value that llama.cpp does not compute with.
    """
    _check_activation(config, architecture)
    for field, value in architecture.fixed:
        _check_fixed(config, field, value, architecture.name)
    for field in architecture.needed:
        if getattr(config, field, None) is None:
            raise ValueError(
                f"{field} must be a number in llama.cpp's {architecture.name!r}, which takes one of its own for None,"
                f" got None; set config.{field} before training, or {NO_REMEDY}"
            )
    _check_scalar(config, architecture, widths)
    _check_layers(config, architecture)
    check_rope(config, architecture.name, factors=architecture.rope_factors, rounded_bounds=architecture.rounded_bounds)
    needed = config.hidden_size // head_width(config)
    if architecture.full_heads and not widths.unequal and widths.heads != needed:
        raise ValueError(
            f"llama.cpp's {architecture.name!r} needs {needed} heads, got {widths.heads}; prune with"
            " prune_attention=False, and leave head_dim at hidden_size / num_attention_heads"
        )


def add_metadata(writer: Any, model: Any, architecture: Architecture) -> None:
    """Write what llama.cpp must know to compute `model`.

    Args:
        writer: a `gguf.GGUFWriter`.
        model: the transformers model.
        architecture: from `architecture_of`.
    """
    config = model.config
    widths, width = layer_widths(model), head_width(config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(context_length(config, architecture))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(widths.feed_forward)
    writer.add_head_count(widths.heads)
    writer.add_head_count_kv(widths.kv_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_vocab_size(model.get_input_embeddings().weight.shape[0])
    if architecture.layer_norm:
        writer.add_layer_norm_eps(config.norm_epsilon)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for fields, kind in ((architecture.scalars, float), (architecture.counts, int)):
        for field, setter in fields:
            if getattr(config, field, None) is not None:
                getattr(writer, setter)(kind(getattr(config, field)))
    if architecture.sliding_pattern and getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    _add_rope(writer, config, width)


def context_length(config: Any, architecture: Architecture) -> int:
    """How far llama.cpp may look: to the end of a sliding window that it does not know."""
    longest = config.max_position_embeddings
    window = getattr(config, "sliding_window", None)
    used = getattr(config, "use_sliding_window", True)
    return min(longest, window) if window and used and not architecture.sliding_pattern else longest


def _add_rope(writer: Any, config: Any, width: int) -> None:
    from gguf import RopeScalingType

    rope = rope_parameters(config)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    if rope["local_theta"]:
        writer.add_rope_freq_base_swa(float(rope["local_theta"]))
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif yarn := yarn_of(config):
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(yarn.factor)
        writer.add_rope_scaling_orig_ctx_len(yarn.trained)
        writer.add_rope_scaling_attn_factors(yarn.attention)


def _check_activation(config: Any, architecture: Architecture) -> None:
    """In the field that transformers reads: the one that the class of transformers 5 declares, with 4 in either."""
    known = " or ".join(map(repr, architecture.activations))
    both = ("hidden_act", "hidden_activation")
    for field in [field for field in both if hasattr(type(config), field)] or both:
        found = getattr(config, field, None)
        if found is not None and found not in architecture.activations:
            raise ValueError(
                f"{field} must be {known} in llama.cpp's {architecture.name!r}, got {found!r}; {NO_REMEDY}"
            )


def _check_fixed(config: Any, field: str, value: Any, name: str) -> None:
    """A field of the rotary embedding's may stand in the config or in its `rope_parameters`."""
    for found in (getattr(config, field, None), rope_parameters(config).get(field)):
        if found is not None and found != value:
            raise ValueError(f"{field} must be {value!r} in llama.cpp's {name!r}, got {found!r}; {NO_REMEDY}")


def _check_scalar(config: Any, architecture: Architecture, widths: Widths) -> None:
    """llama.cpp divides by the root of a head's width; in its largest Gemmas, which it knows by their layers, not."""
    scalar, needed = getattr(config, "query_pre_attn_scalar", None), head_width(config)
    is_wide = architecture.wide_scalar == config.num_hidden_layers
    if is_wide and isinstance(widths.heads, int):
        needed = config.hidden_size // widths.heads
    if scalar is not None and scalar != needed:
        what = f"hidden_size / heads, at {config.num_hidden_layers} layers," if is_wide else "the width of a head"
        raise ValueError(
            f"query_pre_attn_scalar must be {what} in llama.cpp's {architecture.name!r} ({needed}), got {scalar!r};"
            f" {NO_REMEDY}"
        )


def _check_layers(config: Any, architecture: Architecture) -> None:
    """Which layers see the whole context, and which have no rotary embedding."""
    name, types = architecture.name, getattr(config, "layer_types", None)
    if (every := architecture.sliding_pattern) and types:
        expected = [("full" if last else "sliding") + "_attention" for last in _pattern(types, every)]
        if list(types) != expected:
            raise ValueError(
                f"layer_types must have 'full_attention' in every {every}th layer in llama.cpp's {name!r}, got"
                f" {types!r}; {NO_REMEDY}"
            )
    if every := architecture.plain_layers:
        rotated = getattr(config, "no_rope_layers", None)
        if not rotated:
            _check_fixed(config, "no_rope_layer_interval", every, name)
        elif [not rotates for rotates in rotated] != _pattern(rotated, every):
            raise ValueError(
                f"no_rope_layers must be 0 in every {every}th layer in llama.cpp's {name!r}, and 1 in all others, got"
                f" {rotated!r}; {NO_REMEDY}"
            )


def _pattern(layers: Sequence[Any], every: int) -> list[bool]:
    """Which are the last of so many layers."""
    return [(index + 1) % every == 0 for index in range(len(layers))]
