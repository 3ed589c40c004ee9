"""Architectures of transformers that are written as GGUF directly, as data, and what llama.cpp must know of them.

Names of tensors and of metadata come from the tables of the package gguf. What these do not say stands here: how the
rows of the query and key projections are ordered for the rotary embedding, what is added to a norm's weight, which
activation llama.cpp computes. Every row is tested in llama.cpp against transformers. For any other architecture use
`repack_gguf`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from hf_stablespam.quant.export.gguf.rope import check_rope
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
        counts: the same for integers.
        full_heads: llama.cpp takes it that all heads together are as wide as the model.
        rope_factors: llama.cpp reads a factor for each frequency of the rotary embedding, as Llama 3 has them.
        rounded_bounds: llama.cpp rounds the bounds of YaRN's ramp, and is known to, where the models do not.
        by_layer: llama.cpp's name for the same with layers of unequal widths; empty: it has none.
        renamed: part of a parameter's name → what gguf's table has for it.
    """

    name: str
    interleaved: bool = False
    norm_offset: float = 0.0
    activations: tuple[str, ...] = SILU
    layer_norm: bool = False
    sliding_pattern: int = 0
    tensor_scales: bool = False
    scalars: tuple[tuple[str, str], ...] = ()
    counts: tuple[tuple[str, str], ...] = ()
    fixed: tuple[tuple[str, Any], ...] = ()
    full_heads: bool = False
    rope_factors: bool = False
    rounded_bounds: bool = False
    by_layer: str = ""
    renamed: tuple[tuple[str, str], ...] = ()


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

_USED = (("num_experts_per_tok", "add_expert_used_count"),)
_LOCAL_EXPERTS = (("num_local_experts", "add_expert_count"), *_USED)
_EXPERTS = (("num_experts", "add_expert_count"), *_USED)
_NARROW_EXPERTS = (*_EXPERTS, ("moe_intermediate_size", "add_expert_feed_forward_length"))
_SHARED_EXPERT = (("shared_expert_intermediate_size", "add_expert_shared_feed_forward_length"),)
# Every layer is a mixture there.
_MIXED: tuple[tuple[str, Any], ...] = (("decoder_sparse_step", 1), ("mlp_only_layers", []))

ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture("llama", interleaved=True, tensor_scales=True, rope_factors=True, by_layer="deci"),
    "MistralForCausalLM": Architecture(
        "llama", interleaved=True, tensor_scales=True, rope_factors=True, by_layer="deci"
    ),
    "SmolLM3ForCausalLM": Architecture("smollm3", interleaved=True, fixed=(("no_rope_layer_interval", 4),)),
    "GraniteForCausalLM": Architecture("granite", interleaved=True, rope_factors=True, scalars=_GRANITE),
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
    "MixtralForCausalLM": Architecture(
        "llama", interleaved=True, tensor_scales=True, rope_factors=True, counts=_LOCAL_EXPERTS
    ),
    "Qwen2MoeForCausalLM": Architecture(
        "qwen2moe",
        counts=(*_NARROW_EXPERTS, *_SHARED_EXPERT),
        fixed=(("norm_topk_prob", False), *_MIXED),
    ),
    "Qwen3MoeForCausalLM": Architecture(
        "qwen3moe", tensor_scales=True, counts=_NARROW_EXPERTS, fixed=(("norm_topk_prob", True), *_MIXED)
    ),
    "OlmoeForCausalLM": Architecture("olmoe", counts=_EXPERTS, fixed=(("norm_topk_prob", False), ("clip_qkv", None))),
    "GraniteMoeForCausalLM": Architecture(
        "granitemoe",
        interleaved=True,
        rope_factors=True,
        scalars=_GRANITE,
        counts=_LOCAL_EXPERTS,
        renamed=((".router.", ".router.layer."),),
    ),
    "GptOssForCausalLM": Architecture(
        "gpt-oss",
        sliding_pattern=2,
        rounded_bounds=True,
        counts=(*_LOCAL_EXPERTS, ("intermediate_size", "add_expert_feed_forward_length")),
        fixed=(("swiglu_limit", 7.0),),
    ),
}


def architecture_of(model: Any) -> Architecture:
    """The row of `model`.

    Raises:
        ValueError: its class is not in the table, or its configuration has what llama.cpp's architecture has not.
    """
    name = _own_class(model).__name__
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
    check_rope(config, architecture.name, factors=architecture.rope_factors, rounded_bounds=architecture.rounded_bounds)
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


def _own_class(model: Any) -> type:
    """The model's class, without the one that FSDP2 makes of it."""
    cls = type(model)
    while any(base.__name__ == "FSDPModule" for base in cls.__bases__):
        cls = next(base for base in cls.__bases__ if base.__name__ != "FSDPModule")
    return cls


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
