"""Architectures of transformers that are written as GGUF directly, as data, and what llama.cpp must know of them.

Names of tensors and of metadata come from the tables of the package gguf. What these do not say stands here: how the
rows of the query and key projections are ordered for the rotary embedding, what is added to a norm's weight, which
activation llama.cpp computes. Every row is tested in llama.cpp against transformers. For any other architecture use
`repack_gguf`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from hf_stablespam.quant.export.gguf.metadata import check_configuration
from hf_stablespam.quant.export.widths import layer_widths

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
        fixed: field of the config, or of its `rope_parameters` → the only value that llama.cpp computes with.
        needed: those of `scalars` that llama.cpp takes a number of its own for where there is none.
        plain_layers: every so many layers one has no rotary embedding, as llama.cpp has it.
        wide_scalar: the number of layers at which llama.cpp scales attention by hidden_size / heads, and not by the
            width of a head.
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
    needed: tuple[str, ...] = ()
    plain_layers: int = 0
    wide_scalar: int = 0
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

# Of what other values make llama.cpp has no tensors, or no place for, and does not load the file.
_NO_BIAS: tuple[tuple[str, Any], ...] = (("attention_bias", False),)
_UNTIED: tuple[tuple[str, Any], ...] = (("tie_word_embeddings", False),)
_GEMMA: tuple[tuple[str, Any], ...] = (*_NO_BIAS, ("use_bidirectional_attention", False))

ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture("llama", interleaved=True, tensor_scales=True, rope_factors=True, by_layer="deci"),
    "MistralForCausalLM": Architecture(
        "llama", interleaved=True, tensor_scales=True, rope_factors=True, by_layer="deci"
    ),
    "SmolLM3ForCausalLM": Architecture(
        "smollm3", interleaved=True, plain_layers=4, fixed=(*_NO_BIAS, ("mlp_bias", False))
    ),
    "GraniteForCausalLM": Architecture("granite", interleaved=True, rope_factors=True, scalars=_GRANITE),
    "Qwen2ForCausalLM": Architecture("qwen2", full_heads=True),
    "Qwen3ForCausalLM": Architecture("qwen3", tensor_scales=True, fixed=_NO_BIAS),
    "Olmo2ForCausalLM": Architecture("olmo2", full_heads=True, fixed=(*_NO_BIAS, *_UNTIED)),
    "Phi3ForCausalLM": Architecture("phi3", full_heads=True, fixed=(("partial_rotary_factor", 1.0),)),
    "Starcoder2ForCausalLM": Architecture(
        "starcoder2", activations=TANH_GELU, layer_norm=True, full_heads=True, fixed=(("use_bias", True),)
    ),
    "GemmaForCausalLM": Architecture("gemma", norm_offset=1.0, activations=(*TANH_GELU, "gelu"), fixed=_GEMMA),
    "Gemma2ForCausalLM": Architecture(
        "gemma2",
        norm_offset=1.0,
        activations=TANH_GELU,
        sliding_pattern=2,
        scalars=_SOFTCAPS,
        needed=("attn_logit_softcapping", "final_logit_softcapping"),
        fixed=_GEMMA,
        wide_scalar=46,
    ),
    "Gemma3ForCausalLM": Architecture(
        "gemma3",
        norm_offset=1.0,
        activations=TANH_GELU,
        sliding_pattern=6,
        scalars=_SOFTCAPS[1:],
        fixed=_GEMMA,
        wide_scalar=62,
    ),
    "MixtralForCausalLM": Architecture(
        "llama", interleaved=True, tensor_scales=True, rope_factors=True, counts=_LOCAL_EXPERTS
    ),
    "Qwen2MoeForCausalLM": Architecture(
        "qwen2moe",
        counts=(*_NARROW_EXPERTS, *_SHARED_EXPERT),
        full_heads=True,
        fixed=(("norm_topk_prob", False), *_MIXED, *_UNTIED),
    ),
    "Qwen3MoeForCausalLM": Architecture(
        "qwen3moe", tensor_scales=True, counts=_NARROW_EXPERTS, fixed=(("norm_topk_prob", True), *_MIXED, *_NO_BIAS)
    ),
    "OlmoeForCausalLM": Architecture(
        "olmoe",
        counts=_EXPERTS,
        full_heads=True,
        fixed=(("norm_topk_prob", False), ("clip_qkv", None), *_NO_BIAS, *_UNTIED),
    ),
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
        fixed=(("swiglu_limit", 7.0), ("swiglu_alpha", 1.702), ("attention_bias", True), *_UNTIED),
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
    architecture, widths = ARCHITECTURES[name], layer_widths(model)
    check_configuration(model.config, architecture, widths)
    return _with_unequal_widths(architecture) if widths.unequal else architecture


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
