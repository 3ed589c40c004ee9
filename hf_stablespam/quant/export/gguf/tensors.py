"""The tensors of a GGUF file: what of the model goes into each."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_stablespam._sharded import full
from hf_stablespam.quant.export.checks import four_bit_layers
from hf_stablespam.quant.export.gguf.architectures import Architecture
from hf_stablespam.quant.export.gguf.packed import Rows, expert_matrices, of_experts, of_linear, packed_plans
from hf_stablespam.quant.export.gguf.rope import interleave, rope_factors
from hf_stablespam.quant.export.gguf.writer import TensorPlan, to_numpy
from hf_stablespam.quant.export.widths import head_width
from hf_stablespam.quant.layers.experts import FourBitExperts, is_experts, weight_names


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
    blocks = {name: module for name, module in model.named_modules() if is_experts(module)}
    plans: list[TensorPlan] = []
    for key, parameter in model.named_parameters():
        owner, _, kind = key.rpartition(".")
        if owner in blocks:
            plans += _experts(owner, kind, blocks[owner])
            continue
        name = names.get_name(_renamed(key, architecture), try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ValueError(
                f"llama.cpp's architecture {architecture.name!r} has no tensor for {key}; set the option of the model's"
                " config that makes it, or export it for another engine: export_4bit"
            )
        order = _row_order(key, model.config, architecture)
        if owner in layers and kind == "weight":
            plans += packed_plans(name, of_linear(layers[owner], order))
        else:
            name = name if name.endswith((".weight", ".bias")) else f"{name}.weight"
            plans.append(_plain(name, parameter, order, architecture, embedding))
    factors = rope_factors(model.config)
    if factors is not None:
        plans.append(TensorPlan("rope_freqs.weight", "F32", tuple(factors.shape), partial(to_numpy, factors, "F32")))
    return plans


def _renamed(key: str, architecture: Architecture) -> str:
    for ours, theirs in architecture.renamed:
        key = key.replace(ours, theirs)
    return key


def _row_order(key: str, config: Any, architecture: Architecture) -> Rows:
    """What to do with the rows of a parameter."""
    if architecture.interleaved and (".q_proj." in key or ".k_proj." in key):
        return lambda rows: interleave(rows, rows.shape[0] // head_width(config))
    return lambda rows: rows


def _experts(owner: str, kind: str, block: Any) -> list[TensorPlan]:
    """A parameter of all experts of a layer: gate and up, which transformers holds together, are two tensors there.

    Args:
        owner: name of the module.
        kind: name of its parameter.
        block: the module.
    """
    import gguf

    (layer,) = re.findall(r"\.(\d+)\.", owner)
    weight = kind.removesuffix("_bias")
    plans = []
    for which, order in _parts(weight, block).items():
        name = gguf.TENSOR_NAMES[gguf.MODEL_TENSOR[f"FFN_{which}_EXP"]].format(bid=layer)
        if kind != weight:
            plans.append(_plain_experts(f"{name}.bias", block, kind, order))
        elif isinstance(block, FourBitExperts):
            plans += packed_plans(f"{name}.weight", of_experts(block, kind, order))
        else:
            plans.append(_plain_experts(f"{name}.weight", block, kind, order))
    return plans


def _parts(weight: str, block: Any) -> dict[str, Rows]:
    """Which rows of each expert's matrix go into which of llama.cpp's tensors."""
    if weight not in weight_names(block):
        raise ValueError(f"llama.cpp has no tensor for {weight} of {type(block).__name__}; export it with export_4bit")
    if weight == "down_proj":
        return {"DOWN": lambda rows: rows}
    if weight == "up_proj":
        return {"UP": lambda rows: rows}
    if getattr(block, "is_concatenated", True):
        return {"GATE": lambda rows: rows[: len(rows) // 2], "UP": lambda rows: rows[len(rows) // 2 :]}
    return {"GATE": lambda rows: rows[::2], "UP": lambda rows: rows[1::2]}


def _plain_experts(name: str, block: Any, kind: str, order: Rows) -> TensorPlan:
    """A bias of all experts, or their weights in high precision."""
    parameter = getattr(block, kind)

    def rows() -> list[Tensor]:
        if kind.endswith("_bias"):
            return list(full(parameter.detach()).unbind(0))
        return expert_matrices(block, kind)

    sizes = parameter.shape[1:] if kind.endswith("_bias") or not block.is_transposed else parameter.shape[:0:-1]
    shape = (parameter.shape[0], len(order(torch.empty(sizes[0], 0))), *sizes[1:])
    type = "BF16" if len(shape) == 3 and parameter.dtype == torch.bfloat16 else "F32"
    return TensorPlan(name, type, shape, lambda: to_numpy(torch.stack([order(one) for one in rows()]), type))


def _plain(name: str, parameter: Tensor, order: Rows, architecture: Architecture, embedding: str) -> TensorPlan:
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
