"""What llama.cpp must know of a model's configuration, as the metadata of a GGUF file."""

from __future__ import annotations

from typing import Any

from hf_stablespam.quant.export.gguf.architectures import Architecture
from hf_stablespam.quant.export.gguf.rope import rope_parameters, yarn_of
from hf_stablespam.quant.export.widths import head_width, layer_widths


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
