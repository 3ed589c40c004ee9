"""Architectures of transformers that are written as GGUF directly, as data, and what llama.cpp must know of them.

Names of tensors and of metadata come from the tables of the package gguf. What these do not say stands here: how the
rows of the query and key projections are ordered for the rotary embedding, what is added to a norm's weight, which
activation llama.cpp computes. Every row is tested in llama.cpp against transformers. For any other architecture use
`repack_gguf`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_stablespam.quant.export.widths import head_width, layer_widths

SILU, TANH_GELU = ("silu",), ("gelu_pytorch_tanh",)


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Args:
        name: llama.cpp's name.
        interleaved: the rotary embedding turns neighbouring numbers of a head, not those half a head apart as
            transformers' does: rows of query and key are reordered.
        norm_offset: what a norm of transformers adds to its weight.
        activations: values of `hidden_act` that llama.cpp computes as well.
        layer_norm: norms subtract the mean.
        sliding_pattern: every so many layers one sees the whole context, the others a window, as llama.cpp has it;
            0: it knows no window, so that the context ends with it.
        tensor_scales: llama.cpp multiplies by the scale of a whole tensor, which NVFP4 needs.
        scalars: field of the config → name of the metadata's setter in `gguf.GGUFWriter`.
        fixed: field of the config → the only value that llama.cpp computes with.
        full_heads: llama.cpp takes it that all heads together are as wide as the model.
        by_layer: llama.cpp's name for the same with layers of unequal widths; empty: it has none.
    """

    name: str
    interleaved: bool = False
    norm_offset: float = 0.0
    activations: tuple[str, ...] = SILU
    layer_norm: bool = False
    sliding_pattern: int = 0
    tensor_scales: bool = False
    scalars: tuple[tuple[str, str], ...] = ()
    fixed: tuple[tuple[str, Any], ...] = ()
    full_heads: bool = False
    by_layer: str = ""


_SOFTCAPS = (
    ("attn_logit_softcapping", "add_attn_logit_softcapping"),
    ("final_logit_softcapping", "add_final_logit_softcapping"),
)
_GRANITE = (
    ("embedding_multiplier", "add_embedding_scale"),
    ("residual_multiplier", "add_residual_scale"),
    ("attention_multiplier", "add_attention_scale"),
    ("logits_scaling", "add_logit_scale"),
)

ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture("llama", interleaved=True, tensor_scales=True, by_layer="deci"),
    "MistralForCausalLM": Architecture("llama", interleaved=True, tensor_scales=True, by_layer="deci"),
    "SmolLM3ForCausalLM": Architecture("smollm3", interleaved=True, fixed=(("no_rope_layer_interval", 4),)),
    "GraniteForCausalLM": Architecture("granite", interleaved=True, scalars=_GRANITE),
    "Qwen2ForCausalLM": Architecture("qwen2", full_heads=True),
    "Qwen3ForCausalLM": Architecture("qwen3", tensor_scales=True),
    "Olmo2ForCausalLM": Architecture("olmo2"),
    "Phi3ForCausalLM": Architecture("phi3", fixed=(("partial_rotary_factor", 1.0),)),
    "Starcoder2ForCausalLM": Architecture("starcoder2", activations=TANH_GELU, layer_norm=True),
    "GemmaForCausalLM": Architecture("gemma", norm_offset=1.0, activations=(*TANH_GELU, "gelu")),
    "Gemma2ForCausalLM": Architecture(
        "gemma2", norm_offset=1.0, activations=TANH_GELU, sliding_pattern=2, scalars=_SOFTCAPS
    ),
    "Gemma3ForCausalLM": Architecture("gemma3", norm_offset=1.0, activations=TANH_GELU, sliding_pattern=6),
}


def architecture_of(model: Any) -> Architecture:
    """The row of `model`.

    Raises:
        ValueError: its class is not in the table, or its configuration has what llama.cpp's architecture has not.
    """
    name = type(model).__name__
    if name not in ARCHITECTURES:
        raise ValueError(
            f"{name} cannot be written as GGUF directly, which {', '.join(ARCHITECTURES)} can; write its 4-bit numbers"
            " with hf-stablespam export --to unpacked RUN FOLDER, convert the folder with llama.cpp's"
            " convert_hf_to_gguf.py --outtype f16, and pack the result with hf-stablespam repack F16.gguf OUT.gguf"
            " --like RUN"
        )
    architecture, config = ARCHITECTURES[name], model.config
    field = "hidden_act" if hasattr(config, "hidden_act") else "hidden_activation"
    found = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if found not in architecture.activations:
        known = " or ".join(map(repr, architecture.activations))
        raise ValueError(f"{field} must be {known} in llama.cpp's {architecture.name!r}, got {found!r}; {_NO_REMEDY}")
    for field, value in architecture.fixed:
        if getattr(config, field, value) not in (value, None):
            raise ValueError(
                f"{field} must be {value!r} in llama.cpp's {architecture.name!r}, got {getattr(config, field)!r};"
                f" {_NO_REMEDY}"
            )
    scalar, width = getattr(config, "query_pre_attn_scalar", None), head_width(config)
    if scalar is not None and scalar not in (width, config.hidden_size // config.num_attention_heads):
        raise ValueError(f"query_pre_attn_scalar must be the width of a head ({width}), got {scalar!r}; {_NO_REMEDY}")
    if architecture.sliding_pattern and (types := getattr(config, "layer_types", None)):
        _check_layer_types(types, architecture)
    rope_parameters(config)
    widths = layer_widths(model)
    if widths.unequal:
        return _with_unequal_widths(architecture)
    needed = config.hidden_size // width
    if architecture.full_heads and widths.heads != needed:
        raise ValueError(
            f"llama.cpp's {architecture.name!r} needs {needed} heads, got {widths.heads}; prune with"
            " prune_attention=False"
        )
    return architecture


def _with_unequal_widths(architecture: Architecture) -> Architecture:
    """The architecture under which llama.cpp reads a width for each layer."""
    if not architecture.by_layer:
        raise ValueError(
            f"the layers have unequal widths, for which llama.cpp's {architecture.name!r} has no form (those of Llama"
            " and Mistral have one); prune with equal_widths=True"
        )
    return replace(architecture, name=architecture.by_layer, tensor_scales=False)


def _check_layer_types(types: list[str], architecture: Architecture) -> None:
    every = architecture.sliding_pattern
    expected = ["sliding_attention" if (index + 1) % every else "full_attention" for index in range(len(types))]
    if list(types) != expected:
        raise ValueError(
            f"layer_types must have 'full_attention' in every {every}th layer in llama.cpp's {architecture.name!r}, got"
            f" {types!r}; {_NO_REMEDY}"
        )


_NO_REMEDY = "export it for another engine: export_4bit"


def rope_parameters(config: Any) -> dict[str, Any]:
    """Base, kind and scaling of the rotary embedding: transformers 5 has them in one field, 4 in two.

    Raises:
        ValueError: a kind of scaling that is not written directly.
    """
    found = getattr(config, "rope_parameters", None)
    if not found:
        scaling = dict(getattr(config, "rope_scaling", None) or {})
        found = {"rope_theta": getattr(config, "rope_theta", 10000.0), **scaling}
        found["rope_type"] = scaling.get("rope_type", scaling.get("type", "default"))
        if getattr(config, "rope_local_base_freq", None):
            found = {"full_attention": found, "sliding_attention": {"rope_theta": config.rope_local_base_freq}}
    whole = found.get("full_attention", found)
    local = found.get("sliding_attention", {})
    parameters = {**whole, "local_theta": local.get("rope_theta")}
    for kind in (whole.get("rope_type", "default"), local.get("rope_type", "default")):
        if kind not in ("default", "linear", "llama3", "yarn"):
            raise ValueError(
                f"rope_type must be 'default', 'linear', 'llama3' or 'yarn' to be written as GGUF, got {kind!r};"
                " convert with llama.cpp's convert_hf_to_gguf.py and pack its F16 file: hf-stablespam repack"
            )
    return parameters


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
    for field, setter in architecture.scalars:
        if getattr(config, field, None) is not None:
            getattr(writer, setter)(float(getattr(config, field)))
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
    elif kind == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        writer.add_rope_scaling_orig_ctx_len(
            int(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
        )


def rope_factors(config: Any) -> Tensor | None:
    """What Llama 3 divides each frequency of the rotary embedding by, (head / 2); None without that scaling."""
    rope = rope_parameters(config)
    if rope.get("rope_type", "default") != "llama3":
        return None
    width, trained = head_width(config), rope["original_max_position_embeddings"]
    frequency = rope["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    turns = trained * frequency / (2 * torch.pi)  # of a dimension within the context of the pretraining
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    share = ((turns - low) / (high - low)).clamp(0.0, 1.0)  # of the unscaled frequency
    return (1.0 / (share + (1.0 - share) / rope["factor"])).float()


def interleave(rows: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection (or numbers of its bias) in the order of the interleaved rotary embedding.

    Args:
        rows: (heads · width, …).
        heads: of this projection.

    Example:
        >>> interleave(torch.arange(8), heads=2).tolist()
        [0, 2, 1, 3, 4, 6, 5, 7]
    """
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows.shape)
