"""What must hold before a model can be written as a packed checkpoint, and what to do where it does not."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_stablespam._sharded import full
from hf_stablespam.quant.config import FourBitConfig
from hf_stablespam.quant.export.experts import four_bit_experts, stays_unpacked
from hf_stablespam.quant.export.initialization import warn_of_float32_scales, warn_of_initialization
from hf_stablespam.quant.export.packing import KERNEL_GROUPS, fitting_groups
from hf_stablespam.quant.export.widths import CONFIG_KEY, text_config
from hf_stablespam.quant.formats.number_formats import FORMATS, ScaleKind, get_format
from hf_stablespam.quant.layers.checks import check_partners
from hf_stablespam.quant.layers.experts import weight_names
from hf_stablespam.quant.layers.linear import FourBitLinear

logger = logging.getLogger(__name__)

# The fields of a configuration that decide on a weight's numbers, which packed layers must have in common.
PACKED_ALIKE = (
    *("weight", "group_size", "weight_outliers", "weight_block", "four_over_six", "mx_scale_rule", "scale_dtype"),
    "hadamard",
)


def check_packable(
    model: nn.Module, dtype: torch.dtype = torch.bfloat16, leave_unpackable: bool = False
) -> FourBitConfig:
    """Raise or warn about what of `model` has no packed form; return its layers' configuration.

    Everything is known before training, so that nobody trains for days and then cannot export.

    Raises:
        ImportError, ValueError: see `export_4bit`.
    """
    if importlib.util.find_spec("compressed_tensors") is None:
        raise ImportError("export_4bit needs compressed-tensors; install it with: pip install 'hf_stablespam[export]'")
    if hasattr(model, "peft_config"):
        raise ValueError("a PEFT model cannot be packed; merge the adapter first: model = model.merge_and_unload()")
    layers, experts = four_bit_layers(model), four_bit_experts(model)
    if not layers and not experts:
        raise ValueError("the model is not converted to 4 bits; call convert_to_4bit(model, config) first")
    if not hasattr(model, "save_pretrained"):
        raise ValueError(f"model must be a transformers model with save_pretrained, got {type(model).__name__}")
    config = _one_configuration(model)
    check_partners(model)
    _check_format(config, dtype)
    _check_ties(model)
    group = config.group_of("weight")
    failing, why = unpackable(layers, group), stays_unpacked(model, config, group)
    if failing and not leave_unpackable:
        _refuse_groups(layers, failing, group, pruned=hasattr(text_config(model.config), CONFIG_KEY))
    if why is not None and not leave_unpackable:
        raise ValueError(
            f"the experts cannot be packed: {why}; train with weight='int4' or 'mxfp4' and a group_size that fits,"
            " name 'experts' in modules_to_not_convert, or pass leave_unpackable=True to store them rounded, in"
            " bfloat16"
        )
    if len(failing) == len(layers) and (why is not None or not experts):
        raise ValueError(
            f"nothing would be packed: {_widths(layers, failing, group)}{why or ''}; train with a group_size that fits,"
            " for example 'auto'"
        )
    warn_of_initialization(model, layers.keys() - set(failing))
    warn_of_float32_scales(model)
    return config


def four_bit_layers(model: nn.Module) -> dict[str, FourBitLinear]:
    """The model's converted layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FourBitLinear)}


def configurations(model: nn.Module) -> dict[FourBitConfig, list[str]]:
    """Every configuration that a part of the model was converted with, and the names of its layers and experts."""
    found: dict[FourBitConfig, list[str]] = {}
    modules: dict[str, Any] = {**four_bit_layers(model), **four_bit_experts(model)}
    for name, module in modules.items():
        found.setdefault(module.four_bit, []).append(name)
    return found


def _one_configuration(model: nn.Module) -> FourBitConfig:
    """The configuration of all 4-bit layers; raises where they differ in what a packed checkpoint says once for all."""
    (config, (first, *_)), *others = configurations(model).items()
    for other, (name, *_) in others:
        differing = [field for field in PACKED_ALIKE if _packed(config, field) != _packed(other, field)]
        if differing:
            one, two = (", ".join(f"{field}={getattr(x, field)!r}" for field in differing) for x in (config, other))
            raise ValueError(
                f"all 4-bit layers must have one configuration to be packed, got {one} in {first!r} and {two} in"
                f" {name!r}; write the numbers that were trained with export_unpacked (hf-stablespam export --to"
                " unpacked) or export_gguf, or train with one convert_to_4bit of the whole model"
            )
    return config


def _packed(config: FourBitConfig, field: str) -> Any:
    """What a field comes to for the numbers in a checkpoint."""
    if field == "group_size" and config.weight is not None:
        return config.group_of("weight")
    return config.hadamard == "all" if field == "hadamard" else getattr(config, field)


def _refuse_groups(layers: Mapping[str, FourBitLinear], failing: list[str], group_size: int, *, pruned: bool) -> None:
    train = f"Prune with multiple_of={group_size}, train" if pruned else "Train"
    raise ValueError(
        f"{len(failing)} layers cannot be packed: {_widths(layers, failing, group_size)}. {train} with a group_size"
        " that fits, name the layers in modules_to_not_convert, or pass leave_unpackable=True to store them unpacked,"
        " in bfloat16; group_size='auto' looks for a fitting one"
    )


def _widths(layers: Mapping[str, FourBitLinear], names: list[str], group_size: int) -> str:
    sizes = []
    for name in names:
        fitting = ", ".join(map(str, fitting_groups(layers[name].in_features))) or "none from 16 to 256"
        sizes.append(
            f"{name} has {layers[name].in_features} inputs, which groups of {group_size} do not divide"
            f" (groups that fit: {fitting})"
        )
    return "; ".join(sizes)


def unpackable(layers: Mapping[str, FourBitLinear], group_size: int) -> list[str]:
    """Names of the layers whose rows the group does not divide."""
    return [name for name, layer in layers.items() if layer.in_features % group_size]


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise if a tensor holds nan or inf, on all processes that share it; the message names all such tensors."""
    numbers = {name: tensor.detach() for name, tensor in tensors.items() if tensor.is_floating_point()}
    bad = [name for name, tensor in numbers.items() if full((~torch.isfinite(tensor)).sum()) > 0]
    if bad:
        raise ValueError(
            f"tensors must be finite to be exported, got nan or inf in {', '.join(bad)}; the training has diverged:"
            " export an earlier checkpoint"
        )


def _check_format(config: FourBitConfig, dtype: torch.dtype) -> None:
    packable = ", ".join(repr(name) for name, format in FORMATS.items() if format.packing)
    if config.weight is None or get_format(config.weight).packing is None:
        raise ValueError(f"weight={config.weight!r} has no packed form; train with one of {packable}")
    if config.weight_outliers:
        raise ValueError(
            f"weight_outliers={config.weight_outliers}: outliers kept in high precision have no packed form; train with"
            " weight_outliers=0 (outliers of activations are no obstacle)"
        )
    if config.hadamard == "all":
        raise ValueError(
            "hadamard='all': transformed weights have no packed form that loads plainly; train with"
            " hadamard='weight_grad' or None"
        )
    format = get_format(config.weight)
    if format.scale is not ScaleKind.REAL:
        return
    if getattr(torch, config.scale_dtype) != dtype:
        raise ValueError(
            f"scale_dtype={config.scale_dtype!r} must be the checkpoint's dtype, got {dtype}: rounding the scales now"
            f" would change the trained weights; pass dtype=torch.{config.scale_dtype}, or train with"
            f" scale_dtype={str(dtype).removeprefix('torch.')!r}"
        )
    if format.zero_point:
        logger.warning(
            "weight='int4_asym': compressed-tensors 0.18 to 0.20 loads zero points only with"
            " from_pretrained(..., quantization_config=CompressedTensorsConfig(dequantize=True)) of transformers 5;"
            " weight='int4' loads plainly"
        )
    if config.group_size not in KERNEL_GROUPS:
        logger.warning(
            "group_size=%d: transformers loads it, but vLLM's fast INT4 kernels only know groups of %s; train with"
            " group_size=128 for them",
            *(config.group_size, ", ".join(map(str, KERNEL_GROUPS))),
        )


def check_activations(model: nn.Module, activations: bool, calibration: Iterable[Any] | None) -> None:
    """Raise unless an engine can quantize the inputs of all layers of a converted model as training did."""
    for config in configurations(model) if activations else ():
        _check_activations(config, calibration)


def _check_activations(config: FourBitConfig, calibration: Iterable[Any] | None) -> None:
    if config.weight not in ("mxfp4", "nvfp4") or config.activation != config.weight:
        raise ValueError(
            "activations=True needs 'mxfp4' or 'nvfp4' for both weight and activation, got"
            f" weight={config.weight!r}, activation={config.activation!r}; export with activations=False (weight-only)"
        )
    if config.activation_outliers:
        raise ValueError(
            f"activations=True: an engine does not keep activation_outliers={config.activation_outliers}; export with"
            " activations=False, or train with activation_outliers=0"
        )
    if config.activation == "nvfp4" and calibration is None:
        raise ValueError(
            "activations=True with 'nvfp4' needs calibration: a few batches, which fix the scale of the inputs; pass"
            " calibration=[{'input_ids': ...}], or activations=False"
        )


def four_bit_weights(model: nn.Module) -> dict[int, str]:
    """Ids of the weights that are in 4 bits, and the layer or block of experts that each belongs to."""
    weights = {id(layer.weight): name for name, layer in four_bit_layers(model).items()}
    for name, block in four_bit_experts(model).items():
        weights.update({id(getattr(block, weight)): name for weight in weight_names(block)})
    return weights


def _check_ties(model: nn.Module) -> None:
    owners: dict[int, str] = {}
    packed = four_bit_weights(model)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in packed and owners.setdefault(id(parameter), name) != name:
            raise ValueError(
                f"{owners[id(parameter)]} and {name} are one tensor, of which only one use could be packed; name"
                f" {packed[id(parameter)]!r} in modules_to_not_convert"
            )
