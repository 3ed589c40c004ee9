"""What must hold before a model can be written as GGUF, and what to do where it does not."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from torch import nn

from hf_stablespam.quant.config import FourBitConfig
from hf_stablespam.quant.export.checks import configurations, four_bit_layers, four_bit_weights
from hf_stablespam.quant.export.experts import four_bit_experts, row_widths
from hf_stablespam.quant.export.gguf.architectures import architecture_of
from hf_stablespam.quant.export.gguf.blocks import BLOCK_SIZE, TYPES
from hf_stablespam.quant.export.gguf.tensors import tensor_plans
from hf_stablespam.quant.export.gguf.tokenizer import read_vocabulary
from hf_stablespam.quant.formats.number_formats import ScaleKind, get_format
from hf_stablespam.quant.layers.checks import check_partners

EMBEDDING_TYPES = ("q8_0", "f16", "f32")


def check_gguf_package() -> None:
    """Raise unless the package gguf is there, and knows the types that are written."""
    if importlib.util.find_spec("gguf") is None:
        raise ImportError("GGUF files need the package gguf; install it with: pip install 'hf_stablespam[gguf]'")
    from gguf import GGMLQuantizationType

    missing = [name for name in BLOCK_SIZE if not hasattr(GGMLQuantizationType, name)]
    if missing:
        raise ImportError(
            f"the package gguf must know {', '.join(missing)}, an older one is installed; upgrade it with:"
            " pip install 'hf_stablespam[gguf]'"
        )


def check_gguf(model: nn.Module, processing_class: Any = None) -> None:
    """Raise about what of `model` cannot be written as GGUF, whose layers may be in several formats.

    Everything is known before training, so that nobody trains for days and then cannot export.

    Raises:
        ImportError, ValueError: see `export_gguf`.
    """
    check_gguf_package()
    if hasattr(model, "peft_config"):
        raise ValueError(
            "a PEFT model cannot be written as GGUF; merge the adapter first: model = model.merge_and_unload()"
        )
    layers, experts = four_bit_layers(model), four_bit_experts(model)
    if not layers and not experts:
        raise ValueError("the model is not converted to 4 bits; call convert_to_4bit(model, config) first")
    check_partners(model)
    check_formats(model)
    architecture, configs = architecture_of(model), configurations(model)
    if any(config.weight == "nvfp4" for config in configs) and not architecture.tensor_scales:
        raise ValueError(
            f"weight='nvfp4' cannot be written for llama.cpp's {architecture.name!r}, which leaves out the scale of the"
            " whole tensor; train with weight='mxfp4' or 'int4', or export with export_4bit"
        )
    tensor_plans(model, architecture)  # names each tensor, and computes nothing
    _check_ties(model)
    widths = {name: [layer.in_features] for name, layer in layers.items()}
    widths.update({name: row_widths(block) for name, block in experts.items()})
    for config, names in configs.items():
        _check_rows({name: widths[name] for name in names}, config)
    if processing_class is not None:
        read_vocabulary(processing_class, input_embedding(model).shape[0])


def input_embedding(model: Any) -> Any:
    """The matrix (tokens, hidden) that tokens are looked up in."""
    return model.get_input_embeddings().weight


def check_formats(model: nn.Module) -> None:
    """Raise unless ggml has a type for the weights of every 4-bit layer."""
    configs = configurations(model)
    for config, (name, *_) in configs.items():
        _check_format(config, f"{name}: " if len(configs) > 1 else "")


def _check_format(config: FourBitConfig, where: str) -> None:
    known = ", ".join(map(repr, TYPES))
    if config.weight not in TYPES:
        reason = (
            ": ggml's Q4_1 rounds the product of scale and zero point to float16, which changes 1 of 70 weights"
            if config.weight == "int4_asym"
            else ""
        )
        raise ValueError(
            f"{where}weight={config.weight!r} has no exact form in GGUF{reason}; train with one of {known}"
        )
    if config.weight_outliers:
        raise ValueError(
            f"{where}weight_outliers={config.weight_outliers}: outliers kept in high precision have no form in GGUF;"
            " train with weight_outliers=0 (outliers of activations are no obstacle)"
        )
    if config.hadamard == "all":
        raise ValueError(
            f"{where}hadamard='all': llama.cpp does not transform what it multiplies by the weights; train with"
            " hadamard='weight_grad' or None"
        )
    format = get_format(config.weight)
    if format.scale is ScaleKind.REAL and config.scale_dtype == "float32":
        raise ValueError(
            f"{where}scale_dtype='float32': ggml stores scales in float16, which would change the trained weights;"
            " train with scale_dtype='bfloat16' or 'float16'"
        )


def _check_rows(widths: Mapping[str, list[int]], config: FourBitConfig) -> None:
    assert config.weight is not None  # check_formats
    size = BLOCK_SIZE[TYPES[config.weight]]
    group = config.group_of("weight")
    for name, width in ((name, width) for name, several in widths.items() for width in several):
        if width % size:
            raise ValueError(
                f"{name} has {width} inputs, which blocks of {size} ({TYPES[config.weight]}) do not divide;"
                " name it in modules_to_not_convert before training"
            )
        if config.weight not in ("mxfp4", "nvfp4") and group % size and group < width:
            raise ValueError(
                f"group_size must be a multiple of {size} to be written as GGUF, got {group}; train with group_size=32"
            )


def _check_ties(model: nn.Module) -> None:
    packed = four_bit_weights(model)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = packed.get(id(parameter))
        if owner is not None and name.rpartition(".")[0] != owner:
            raise ValueError(
                f"{owner}.{name.rpartition('.')[2]} and {name} are one tensor, which the file holds once; name"
                f" {owner!r} in modules_to_not_convert before training"
            )
