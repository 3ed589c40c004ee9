"""Rounding the matrices of a mixture's experts: each on a grid of its own, and only those that tokens go to."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_stablespam.quant.formats.number_formats import ScaleKind
from hf_stablespam.quant.formats.quantizer import amax_of_each
from hf_stablespam.quant.layers.matmul import Recipe, quantize_weight


def used_experts(index: Tensor, count: int) -> list[int] | None:
    """The experts that tokens go to, or `None` where asking would make a device wait or end a compiled graph.

    Args:
        index: which experts each token goes to; places past the last expert are of experts on other devices, for which
            ``batched_mm`` reads the last one.
        count: number of experts.
    """
    if index.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    return index.clamp(max=count - 1).unique().tolist()


def quantize_experts(
    weight: Tensor, recipe: Recipe, dtype: torch.dtype, transposed: bool, used: list[int] | None = None
) -> Tensor:
    """The weights (experts, out, in) of all experts as their products use them, in `dtype`.

    Args:
        weight: the master weights; with `transposed` (experts, in, out), and so is what is returned.
        recipe: what to do.
        dtype: of the product.
        transposed: see `weight`.
        used: the experts that are needed, on a CPU; the numbers of others are never written. Default: all.
    """
    weight = weight.detach()
    rows = weight.transpose(1, 2) if transposed else weight
    at_once = rows.is_cuda or torch.compiler.is_compiling()  # a loop would be written out, expert by expert
    # Square blocks are those of one matrix, and a transform's sums depend on how many are multiplied.
    alone = recipe.hadamard == "all" or (recipe.weight is not None and recipe.weight.square)
    if at_once and not alone:
        rows = rows.contiguous()
        quantizer, amax = recipe.weight, None
        if quantizer is not None and quantizer.format.scale is ScaleKind.E4M3:
            amax = amax_of_each(rows, quantizer)
        rounded = quantize_weight(rows, recipe, dtype, amax)
    else:  # on a CPU one expert at a time stays in the cache
        rounded = torch.empty(rows.shape, dtype=dtype, device=rows.device)
        matrices, results = rows.unbind(0), rounded.unbind(0)
        for expert in range(len(rows)) if used is None else used:
            results[expert].copy_(quantize_weight(matrices[expert].contiguous(), recipe, dtype))
    return rounded.transpose(1, 2) if transposed else rounded
