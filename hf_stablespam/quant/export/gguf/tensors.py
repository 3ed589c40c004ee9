"""The tensors of a GGUF file: what of the model goes into each, and how what was written is compared with it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_stablespam._sharded import full
from hf_stablespam.quant.export.checks import four_bit_layers
from hf_stablespam.quant.export.gguf.architectures import Architecture, interleave, rope_factors
from hf_stablespam.quant.export.gguf.blocks import TYPES, nvfp4_scales, pack
from hf_stablespam.quant.export.gguf.writer import TensorPlan, to_numpy
from hf_stablespam.quant.export.widths import head_width
from hf_stablespam.quant.formats.quantizer import quantize
from hf_stablespam.quant.formats.scales import tensor_scale
from hf_stablespam.quant.layers.linear import FourBitLinear
from hf_stablespam.quant.layers.matmul import quantize_weight


def tensor_plans(model: Any, architecture: Architecture, embedding: str = "q8_0") -> list[TensorPlan]:
    """Every tensor of the file.

    Args:
        model: the converted model.
        architecture: its row of the table.
        embedding: see `export_gguf`.

    Raises:
        ValueError: a parameter that llama.cpp's architecture has no name for.
    """
    import gguf

    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    layers = four_bit_layers(model)
    plans: list[TensorPlan] = []
    for key, parameter in model.named_parameters():
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ValueError(
                f"llama.cpp's architecture {architecture.name!r} has no tensor for {key}; set the option of the model's"
                " config that makes it, or export it for another engine: export_4bit"
            )
        order = _row_order(key, model.config, architecture)
        owner, _, kind = key.rpartition(".")
        if owner in layers and kind == "weight":
            plans += _packed(name, layers[owner], order)
        else:
            plans.append(_plain(name, parameter, order, architecture, embedding))
    factors = rope_factors(model.config)
    if factors is not None:
        plans.append(TensorPlan("rope_freqs.weight", "F32", tuple(factors.shape), partial(to_numpy, factors, "F32")))
    return plans


def _row_order(key: str, config: Any, architecture: Architecture) -> Callable[[Tensor], Tensor]:
    """What to do with the rows of a parameter."""
    if architecture.interleaved and (".q_proj." in key or ".k_proj." in key):
        return lambda rows: interleave(rows, rows.shape[0] // head_width(config))
    return lambda rows: rows


def _plain(
    name: str, parameter: Tensor, order: Callable[[Tensor], Tensor], architecture: Architecture, embedding: str
) -> TensorPlan:
    """A parameter that is not 4-bit."""
    shape = tuple(parameter.shape)
    if len(shape) == 1:
        type = "F32"
    elif name in ("token_embd.weight", "output.weight"):
        type = "F16" if embedding == "q8_0" and shape[-1] % 32 else embedding.upper()
    else:
        type = "BF16" if parameter.dtype == torch.bfloat16 else "F32"
    offset = architecture.norm_offset if len(shape) == 1 and "norm" in name else 0.0

    def data() -> np.ndarray:
        rows = order(full(parameter.detach()))
        return to_numpy(rows.float() + offset if offset else rows, type)

    return TensorPlan(name, type, shape, data)


def _packed(name: str, layer: FourBitLinear, order: Callable[[Tensor], Tensor]) -> list[TensorPlan]:
    """A 4-bit weight, and for NVFP4 the scale of the whole tensor."""
    assert layer.four_bit.weight is not None
    assert layer.recipe.weight is not None
    ggml_type, quantizer = TYPES[layer.four_bit.weight], layer.recipe.weight
    shape = (layer.out_features, layer.in_features)

    def data() -> np.ndarray:
        parts = quantize(full(layer.weight), quantizer, layer.shared_amax())
        try:
            return order(pack(parts, ggml_type)).cpu().numpy()
        except ValueError as error:
            raise ValueError(f"{name} cannot be written as {ggml_type}: {error}; train with larger weights") from None

    def whole_scale() -> Tensor:
        amax = layer.shared_amax()
        return tensor_scale(
            full(layer.weight.detach()).abs().amax() if amax is None else amax, quantizer.four_over_six
        ).reshape(1)

    def verify(stored: np.ndarray) -> None:
        weight = full(layer.weight)
        trained = order(quantize_weight(weight, layer.recipe, weight.dtype, layer.shared_amax())).cpu()
        numbers = _stored_numbers(stored, ggml_type, whole_scale().cpu() if ggml_type == "NVFP4" else None)
        different = int((numbers.to(trained.dtype) != trained).sum())
        if different:
            raise RuntimeError(
                f"{name}: {different} of {trained.numel()} weights read back are not those that were trained; no file"
                " was written. Please report it, with the model's configuration"
            )

    plans = [TensorPlan(name, ggml_type, shape, data, verify)]
    if ggml_type == "NVFP4":
        scale_name = name.removesuffix(".weight") + ".scale"

        def verify_scale(stored: np.ndarray) -> None:
            if not torch.equal(torch.from_numpy(np.array(stored)), whole_scale().cpu()):
                raise RuntimeError(f"{scale_name} read back is not the trained one; no file was written")

        plans.append(TensorPlan(scale_name, "F32", (1,), lambda: to_numpy(whole_scale(), "F32"), verify_scale))
    return plans


def _stored_numbers(stored: np.ndarray, ggml_type: str, whole: Tensor | None) -> Tensor:
    """The numbers that the packed bytes of the file stand for, by gguf's own reading of them."""
    from gguf import GGMLQuantizationType, quants

    numbers = torch.from_numpy(quants.dequantize(stored, GGMLQuantizationType[ggml_type]))
    if whole is None:
        return numbers
    # Training multiplied the two scales first; llama.cpp multiplies the product by the tensor's scale at the end.
    scales = nvfp4_scales(torch.from_numpy(np.array(stored))).repeat_interleave(16, -1)
    return (numbers / scales) * (whole * scales)
