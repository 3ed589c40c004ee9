"""The experts of a mixture in a packed checkpoint.

A checkpoint of most mixtures holds one matrix for each expert (``…experts.3.down_proj.weight``), which transformers
puts together while loading and takes apart while saving. Each of them is packed as a linear layer's weight is, after
the model has written itself. Families whose checkpoints hold all experts in one tensor (Granite; GPT-OSS but in MXFP4,
see `gpt_oss`), and formats whose packed experts transformers does not read right, get the rounded numbers under the
model's own names instead.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_stablespam._sharded import full
from hf_stablespam.quant.config import FourBitConfig
from hf_stablespam.quant.export.packing import pack_weight
from hf_stablespam.quant.formats.quantizer import Quantizer
from hf_stablespam.quant.layers.expert_weights import quantize_experts
from hf_stablespam.quant.layers.experts import FourBitExperts, is_experts, weight_names

ONE_EXPERT = re.compile(r"\.experts\.\d+\.[^.]+\.weight$")
# transformers ignores the global scales of packed NVFP4 experts, and has no zero points for them.
READ_RIGHT = ("int4", "fp4_e1m2", "mxfp4")


def four_bit_experts(model: nn.Module) -> dict[str, FourBitExperts]:
    """The model's converted blocks of experts by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FourBitExperts)}


def has_plain_experts(model: nn.Module) -> bool:
    """Whether blocks of experts stay in high precision: a packed file must have them under the model's own names."""
    return any(is_experts(module) and not isinstance(module, FourBitExperts) for module in model.modules())


def stays_unpacked(model: nn.Module, config: FourBitConfig, group_size: int) -> str | None:
    """Why the experts are stored as rounded numbers and not packed; `None` where they are packed, or there are none."""
    experts = four_bit_experts(model)
    if experts and config.weight not in READ_RIGHT:
        return f"transformers does not read packed experts in {config.weight} right"
    if experts and has_plain_experts(model):
        return "some blocks of experts are in high precision, which transformers does not read beside packed ones"
    for name, block in experts.items():
        for width in row_widths(block):
            if width % group_size:
                return f"{name} has rows of {width}, which groups of {group_size} do not divide"
    return None


def expert_weights(model: nn.Module) -> dict[str, Tensor]:
    """The experts' master weights under their names in a state dict, whole; a collective operation where sharded."""
    return {
        f"{block_name}.{name}": full(getattr(block, name).detach()).contiguous()
        for block_name, block in four_bit_experts(model).items()
        for name in weight_names(block)
    }


def rounded_experts(model: nn.Module, weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The numbers on the 4-bit grid, in `dtype`, of `expert_weights`."""
    rounded = {}
    for name, weight in weights.items():
        block: Any = model.get_submodule(name.rpartition(".")[0])
        rounded[name] = quantize_experts(weight, block.recipe, dtype, bool(block.is_transposed)).contiguous()
    return rounded


def pack_experts(
    folder: Path, model: nn.Module, rounded: dict[str, Tensor], quantizer: Quantizer, scheme: Any
) -> bool | None:
    """Replace each expert's matrix in a written checkpoint by its packed form, and say whether there were any.

    Where the family's checkpoints hold all experts in one tensor, the rounded numbers take its place. None if what was
    written is neither: it must be written again, under the model's own names.

    Args:
        folder: where the checkpoint is.
        model: the one that has been written.
        rounded: from `rounded_experts`; those that are written are taken out.
        quantizer: of the weights.
        scheme: of `compressed_tensors_scheme`.
    """
    places: dict[str, str] = {}
    packed = 0
    from safetensors.torch import load_file, save_file

    for file in sorted(folder.glob("*.safetensors")):
        tensors: dict[str, Tensor] = {}
        for name, tensor in load_file(file).items():
            if ONE_EXPERT.search(name) and tensor.ndim == 2:
                parts = pack_weight(tensor, quantizer, None, scheme)
                prefix = name.removesuffix("weight")
                tensors.update({f"{prefix}{key}": value.contiguous() for key, value in parts.items()})
                packed += 1
            else:
                tensors[name] = rounded.pop(name, tensor)
        save_file(tensors, file, metadata={"format": "pt"})
        places.update(dict.fromkeys(tensors, file.name))
    _rewrite_index(folder, places)
    expected = sum(block.num_experts * (3 if block.has_gate else 2) for block in four_bit_experts(model).values())
    if packed not in (0, expected) or (packed == 0 and rounded):  # rounded: what no tensor of the file has taken
        return None
    return packed > 0


def row_widths(block: FourBitExperts) -> list[int]:
    """Widths of the rows that groups run along."""
    dim = 1 if block.is_transposed else 2
    return [getattr(block, name).shape[dim] for name in weight_names(block)]


def _rewrite_index(folder: Path, places: dict[str, str]) -> None:
    path = folder / "model.safetensors.index.json"
    if path.exists():
        index = json.loads(path.read_text())
        index["weight_map"] = places
        index["metadata"]["total_size"] = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
