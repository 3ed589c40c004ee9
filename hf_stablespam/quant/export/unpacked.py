"""A model trained in 4 bits → an ordinary checkpoint that holds the 4-bit numbers as floats, for other converters."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_stablespam._atomic import atomic_folder, check_writable
from hf_stablespam._sharded import full
from hf_stablespam._shared_errors import groups_of, shared_errors
from hf_stablespam.quant.export.checks import check_finite, configurations, four_bit_weights
from hf_stablespam.quant.export.state import whole_state_dict
from hf_stablespam.quant.export.widths import write_widths
from hf_stablespam.quant.formats.quantizer import quantize
from hf_stablespam.quant.layers.checks import check_partners
from hf_stablespam.quant.layers.experts import FourBitExperts, weight_names
from hf_stablespam.quant.layers.linear import FourBitLinear


def grid_weight(layer: FourBitLinear) -> Tensor:
    """The layer's weight on its grid, code times scale in float32: before it is rounded to the weight's own dtype."""
    weight = full(layer.weight)
    if layer.recipe.weight is None:
        return weight.detach().float()
    with torch.no_grad():
        return quantize(weight, layer.recipe.weight, layer.shared_amax()).consume().float()


def grid_experts(block: FourBitExperts, name: str) -> Tensor:
    """The same of the weights `name` of all experts, laid out as the parameter."""
    assert block.recipe.weight is not None  # as for all that is written
    weight = full(getattr(block, name).detach())
    rows = weight.mT.contiguous() if block.is_transposed else weight
    grid = torch.stack([quantize(one, block.recipe.weight).consume().float() for one in rows.unbind(0)])
    return grid.mT.contiguous() if block.is_transposed else grid


def export_unpacked(
    model: nn.Module,
    directory: str | os.PathLike[str],
    processing_class: Any = None,
    *,
    is_main_process: bool = True,
) -> None:
    """Write a checkpoint whose 4-bit layers hold the numbers of their grids, as float32.

    For converters that know the model's architecture and not our formats: llama.cpp's ``convert_hf_to_gguf.py``, whose
    file `repack_gguf` packs without loss. bfloat16 could not hold the product of a code and its scale.

    Args:
        model: a transformers model converted by `convert_to_4bit`; it is not changed.
        directory: where to write.
        processing_class: tokenizer or processor to save beside it.
        is_main_process: False on the other processes of a distributed run, which take part but write nothing.

    Raises:
        ValueError: the model is not converted, an adapter is not merged, weights are transformed (``hadamard="all"``),
            a 4-bit weight is tied to one in high precision, or a weight is not finite.
        OSError: it cannot be written there, or the disk is full; `directory` is then what it was.
        What one process raises, all raise that share a sharded model.
    """
    groups = groups_of(model.parameters())
    with shared_errors(groups):
        _check(model)
        if is_main_process:
            check_writable(directory)
    tensors = whole_state_dict(model, torch.float32)
    for name, module in model.named_modules(remove_duplicate=False):  # under all of its names
        if isinstance(module, FourBitLinear):
            tensors[f"{name}.weight" if name else "weight"] = grid_weight(module)
        elif isinstance(module, FourBitExperts) and module.recipe.weight is not None:
            tensors.update({f"{name}.{weight}": grid_experts(module, weight) for weight in weight_names(module)})
    check_finite(tensors)
    with shared_errors(groups):
        if is_main_process:
            with atomic_folder(directory) as folder:
                _save(model, folder, tensors, processing_class)


def _check(model: nn.Module) -> None:
    """Raise about what has no such form."""
    if hasattr(model, "peft_config"):
        raise ValueError("a PEFT model holds two weights where one is exported; merge it first: merge_and_unload()")
    if not configurations(model):
        raise ValueError("the model is not converted to 4 bits; call convert_to_4bit(model, config) first")
    for config, (name, *_) in configurations(model).items():
        if config.hadamard == "all":
            raise ValueError(
                f"hadamard='all' in {name!r}: the 4-bit numbers are those of transformed weights, which no other code"
                " multiplies by transformed inputs; train with hadamard='weight_grad' or None"
            )
    check_partners(model)
    rounded, modules = four_bit_weights(model), dict(model.named_modules(remove_duplicate=False))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        user = modules[name.rpartition(".")[0]]
        if id(parameter) in rounded and not isinstance(user, FourBitLinear | FourBitExperts):
            raise ValueError(
                f"{name} is in high precision, and one tensor with the weight of {rounded[id(parameter)]!r}, which is"
                " in 4 bits: what loads the checkpoint has the same numbers for both; name"
                f" {rounded[id(parameter)]!r} in modules_to_not_convert before training"
            )


def _save(model: Any, folder: Path, tensors: dict[str, Tensor], processing_class: Any) -> None:
    """Let the model save itself with other tensors, and correct what its config says about them."""
    model.save_pretrained(folder, state_dict=tensors)
    path = folder / "config.json"
    written = json.loads(path.read_text())
    written["torch_dtype" if "torch_dtype" in written else "dtype"] = "float32"
    written.pop("quantization_config", None)  # what is read there is not converted again
    path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
    write_widths(model.config, folder)
    if processing_class is not None:
        processing_class.save_pretrained(folder)
