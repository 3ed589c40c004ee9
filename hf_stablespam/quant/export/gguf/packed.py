"""4-bit weights → tensors of a GGUF file in ggml's types, and the comparison of what was written with training."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_stablespam._sharded import full
from hf_stablespam.quant.config import FourBitConfig
from hf_stablespam.quant.export.gguf.blocks import TYPES, nvfp4_scales, pack
from hf_stablespam.quant.export.gguf.writer import TensorPlan, to_numpy
from hf_stablespam.quant.formats.quantizer import quantize
from hf_stablespam.quant.formats.scales import tensor_scale
from hf_stablespam.quant.layers.experts import FourBitExperts
from hf_stablespam.quant.layers.linear import FourBitLinear
from hf_stablespam.quant.layers.matmul import Recipe, quantize_weight

Rows = Callable[[Tensor], Tensor]


class Matrices(NamedTuple):
    """4-bit matrices that are one tensor of the file: a linear layer's, or those of all experts.

    Attributes:
        config, recipe: how they are rounded.
        shape: of the numbers in the file.
        gather: gives each master weight (out, in), whole, and the magnitude that its NVFP4 scale is made from, or None
            for its own. A collective operation where weights are sharded.
        order: what to do with the rows of each.
    """

    config: FourBitConfig
    recipe: Recipe
    shape: tuple[int, ...]
    gather: Callable[[], list[tuple[Tensor, Tensor | None]]]
    order: Rows


def of_linear(layer: FourBitLinear, order: Rows) -> Matrices:
    """The weight of a linear layer."""
    return Matrices(
        layer.four_bit,
        layer.recipe,
        (layer.out_features, layer.in_features),
        lambda: [(full(layer.weight.detach()), layer.shared_amax())],
        order,
    )


def of_experts(block: FourBitExperts, name: str, order: Rows) -> Matrices:
    """The weights `name` of a block of experts, of which `order` may take some rows only."""
    experts, *matrix = getattr(block, name).shape
    rows, width = reversed(matrix) if block.is_transposed else matrix
    return Matrices(
        block.four_bit,
        block.recipe,
        (experts, len(order(torch.empty(rows, 0))), width),
        lambda: [(matrix, None) for matrix in expert_matrices(block, name)],
        order,
    )


def expert_matrices(block: FourBitExperts, name: str) -> list[Tensor]:
    """The master weights (out, in) of each expert."""
    weight = full(getattr(block, name).detach())
    return [one.t().contiguous() if block.is_transposed else one for one in weight.unbind(0)]


def packed_plans(name: str, matrices: Matrices) -> list[TensorPlan]:
    """A 4-bit tensor of the file, and for NVFP4 the scale of each whole matrix."""
    assert matrices.config.weight is not None
    assert matrices.recipe.weight is not None
    ggml_type, quantizer = TYPES[matrices.config.weight], matrices.recipe.weight

    def together(parts: list[Tensor]) -> Tensor:
        """One tensor of what was made of each matrix."""
        return (
            torch.stack([matrices.order(part) for part in parts])
            if len(matrices.shape) == 3
            else (matrices.order(parts[0]))
        )

    def data() -> np.ndarray:
        try:
            parts = [pack(quantize(matrix, quantizer, amax), ggml_type) for matrix, amax in matrices.gather()]
        except ValueError as error:
            raise ValueError(f"{name} cannot be written as {ggml_type}: {error}; train with larger weights") from None
        return together(parts).cpu().numpy()

    def whole_scales(gathered: list[tuple[Tensor, Tensor | None]]) -> Tensor:
        peaks = [matrix.abs().amax() if amax is None else amax for matrix, amax in gathered]
        return torch.stack([tensor_scale(peak, quantizer.four_over_six).reshape(()) for peak in peaks])

    def verify(stored: np.ndarray) -> None:
        gathered = matrices.gather()
        trained = together(
            [quantize_weight(matrix, matrices.recipe, matrix.dtype, amax) for matrix, amax in gathered]
        ).cpu()
        numbers = _stored_numbers(stored, ggml_type, whole_scales(gathered).cpu() if ggml_type == "NVFP4" else None)
        different = int((numbers.to(trained.dtype) != trained).sum())
        if different:
            raise RuntimeError(
                f"{name}: {different} of {trained.numel()} weights read back are not those that were trained; no file"
                " was written. Please report it, with the model's configuration"
            )

    plans = [TensorPlan(name, ggml_type, matrices.shape, data, verify)]
    if ggml_type == "NVFP4":
        scale_name = name.removesuffix(".weight") + ".scale"

        def verify_scale(stored: np.ndarray) -> None:
            if not torch.equal(torch.from_numpy(np.array(stored)), whole_scales(matrices.gather()).cpu()):
                raise RuntimeError(f"{scale_name} read back is not the trained one; no file was written")

        scales = (matrices.shape[0] if len(matrices.shape) == 3 else 1,)
        plans.append(
            TensorPlan(
                scale_name, "F32", scales, lambda: to_numpy(whole_scales(matrices.gather()), "F32"), verify_scale
            )
        )
    return plans


def _stored_numbers(stored: np.ndarray, ggml_type: str, whole: Tensor | None) -> Tensor:
    """The numbers that the packed bytes of the file stand for, by gguf's own reading of them."""
    from gguf import GGMLQuantizationType, quants

    numbers = torch.from_numpy(quants.dequantize(stored, GGMLQuantizationType[ggml_type]))
    if whole is None:
        return numbers
    # Training multiplied the two scales first; llama.cpp multiplies the product by the tensor's scale at the end.
    scales = nvfp4_scales(torch.from_numpy(np.array(stored))).repeat_interleave(16, -1)
    return (numbers / scales) * (whole.view(-1, *[1] * (stored.ndim - 1)) * scales)
