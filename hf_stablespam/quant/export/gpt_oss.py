"""GPT-OSS in the layout that it is shipped in: experts in MXFP4 (``quant_method: mxfp4``), all else as plain numbers.

transformers, vLLM and llama.cpp's converter read it. A matrix (out, in) of an expert is stored as ``…_blocks`` (out,
in / 32, 16), two codes in a byte with the first in its low half, and ``…_scales`` (out, in / 32), exponents plus 127.
The format has no place for other layers in 4 bits; their numbers on the MXFP4 grid are exact in bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_stablespam._sharded import full
from hf_stablespam.quant.config import FourBitConfig
from hf_stablespam.quant.export.experts import four_bit_experts, has_plain_experts, row_widths
from hf_stablespam.quant.export.packing import pack_weight
from hf_stablespam.quant.formats.quantizer import Quantizer
from hf_stablespam.quant.layers.experts import weight_names

BLOCK = 32
QUANTIZATION_CONFIG = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}


def has_native_layout(model: nn.Module, config: FourBitConfig) -> bool:
    """Whether the model is a GPT-OSS whose experts are all in MXFP4, so that its own layout can hold them."""
    blocks = list(four_bit_experts(model).values())
    return (
        config.weight == "mxfp4"
        and bool(blocks)
        and all(block.original_class.__name__ == "GptOssExperts" for block in blocks)
        and not has_plain_experts(model)
        and not any(width % BLOCK for block in blocks for width in row_widths(block))
    )


def pack_native(model: nn.Module, tensors: dict[str, Tensor], quantizer: Quantizer, scheme: Any) -> None:
    """Put blocks and scales in the place of the experts' weights in a state dict.

    Args:
        model: see `has_native_layout`.
        tensors: changed in place.
        quantizer: that of the weights.
        scheme: of `compressed_tensors_scheme`.
    """
    for block_name, block in four_bit_experts(model).items():
        for name in weight_names(block):
            rows = full(getattr(block, name).detach()).mT  # (experts, out, in)
            packed = [pack_weight(one.contiguous(), quantizer, None, scheme) for one in rows.unbind(0)]
            scales = torch.stack([parts["weight_scale"] for parts in packed])
            codes = torch.stack([parts["weight_packed"] for parts in packed])
            del tensors[f"{block_name}.{name}"]
            tensors[f"{block_name}.{name}_blocks"] = codes.view(*scales.shape, BLOCK // 2)
            tensors[f"{block_name}.{name}_scales"] = scales
