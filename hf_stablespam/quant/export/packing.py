"""One 4-bit weight → the tensors that compressed-tensors stores for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_stablespam.quant.formats.number_formats import ScaleKind
from hf_stablespam.quant.formats.quantizer import Quantizer, quantize

# Group sizes that vLLM's fast INT4 kernels know, besides whole rows.
KERNEL_GROUPS = (32, 64, 128)
# Zero points count from the lowest code there, which is -8.
LOWEST_CODE = -8


def compressed_tensors_scheme(quantizer: Quantizer, activation: str | None) -> Any:
    """The `QuantizationScheme` of `nn.Linear` layers with weights made by `quantizer`.

    Args:
        quantizer: of the weight.
        activation: ``"nvfp4"`` or ``"mxfp4"`` to let the engine quantize the inputs too; None: weights only.
    """
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme

    format = quantizer.format
    if format.scale is ScaleKind.REAL:
        arguments = QuantizationArgs(
            num_bits=4,
            type="int",
            strategy="group",
            group_size=quantizer.group_size,
            symmetric=not format.zero_point,
            dynamic=False,
        )
        scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    else:
        preset = format.name.upper() + ("" if activation else "A16")
        scheme = preset_name_to_scheme(preset, ["Linear"])
    scheme.format = format.packing
    return scheme


def pack_weight(weight: Tensor, quantizer: Quantizer, amax: Tensor | None, scheme: Any) -> dict[str, Tensor]:
    """The packed tensors of one weight, by their names in the checkpoint.

    Args:
        weight: (out, in), the master weight.
        quantizer: as in training.
        amax: see `quantize`.
        scheme: from `compressed_tensors_scheme`.
    """
    from compressed_tensors.compressors import BaseCompressor

    parts = quantize(weight, quantizer, amax)
    scale, block_scale, whole, zero = parts.scale, parts.block_scale, parts.tensor_scale, parts.zero
    tensors = {"weight": parts.dequantize().float()}
    if block_scale is not None and whole is not None:
        tensors["weight_scale"] = block_scale.squeeze(-1)
        tensors["weight_global_scale"] = (1.0 / whole).reshape(1)  # readers divide by it, see `readable_scale`
    elif quantizer.format.scale is ScaleKind.REAL and quantizer.scale_dtype is not None:
        tensors["weight_scale"] = scale.squeeze(-1).to(quantizer.scale_dtype)
    else:
        tensors["weight_scale"] = scale.squeeze(-1)
    if zero is not None:
        tensors["weight_zero_point"] = (zero.squeeze(-1) + LOWEST_CODE).to(torch.int8)
    return BaseCompressor.get_value_from_registry(scheme.format).compress(tensors, scheme)


def fitting_groups(width: int) -> list[int]:
    """Group sizes from 16 to 256 that divide `width`, largest first."""
    return [size for size in range(256, 15, -1) if width % size == 0]
