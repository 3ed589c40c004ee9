"""A model trained in 4 bits → a packed 4-bit checkpoint in the format of compressed-tensors."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_stablespam._announce import announce
from hf_stablespam._atomic import atomic_folder, check_writable
from hf_stablespam._sharded import full
from hf_stablespam._shared_errors import groups_of, shared_errors
from hf_stablespam.quant.export.calibration import check_reached, input_amax
from hf_stablespam.quant.export.checks import (
    check_activations,
    check_finite,
    check_packable,
    four_bit_layers,
    unpackable,
)
from hf_stablespam.quant.export.experts import (
    expert_weights,
    four_bit_experts,
    has_plain_experts,
    pack_experts,
    rounded_experts,
    stays_unpacked,
)
from hf_stablespam.quant.export.gpt_oss import QUANTIZATION_CONFIG, has_native_layout, pack_native
from hf_stablespam.quant.export.packing import compressed_tensors_scheme, pack_weight
from hf_stablespam.quant.export.sequential_experts import take_apart
from hf_stablespam.quant.export.split_weights import splits_others
from hf_stablespam.quant.export.state import whole_state_dict
from hf_stablespam.quant.export.widths import write_widths
from hf_stablespam.quant.formats.scales import tensor_scale
from hf_stablespam.quant.layers.linear import FourBitLinear
from hf_stablespam.quant.layers.matmul import quantize_weight

logger = logging.getLogger(__name__)


def export_4bit(
    model: nn.Module,
    directory: str | os.PathLike[str],
    processing_class: Any = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    leave_unpackable: bool = False,
    activations: bool = False,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    is_main_process: bool = True,
) -> None:
    """Write the 4-bit weights of a trained model as a packed checkpoint.

    Plain ``AutoModelForCausalLM.from_pretrained(directory)`` loads it (with compressed-tensors installed), as do
    inference engines. In bfloat16 its weights are exactly those that the forward pass of training used. (transformers
    before 5 rounds NVFP4's global scale while loading, and cannot load ``int4_asym``.)

    A GPT-OSS with ``mxfp4`` weights is written in the layout that it is shipped in (``quant_method: mxfp4``), unless
    `activations` is set: its experts packed, its other 4-bit layers as the same numbers in `dtype`.

    A pruned model whose layers differ in width is for `load_pruned` of `hf_stablespam.recipes.adapt_pruner` instead.

    Args:
        model: a transformers model converted by `convert_to_4bit`; it is not changed.
        directory: where to write config, weights (safetensors), generation config and tokenizer.
        processing_class: tokenizer or processor to save beside the weights; None saves none.
        dtype: dtype of everything that is not 4-bit.
        leave_unpackable: store layers whose rows the group does not divide as unpacked numbers, which are those of
            the 4-bit grid, instead of raising.
        activations: tell the engine to quantize the inputs as well; only with ``mxfp4`` or ``nvfp4`` for both. The
            default is weight-only: then inputs are computed with in high precision.
        calibration: inputs of the model (dictionaries of keyword arguments); needed for the inputs' fixed scale of
            ``nvfp4`` with `activations`, and to reach every packed layer.
        is_main_process: False on the other processes of a distributed run, which take part but write nothing.

    Raises:
        ImportError: compressed-tensors is not installed.
        ValueError: the model is not converted, or its parts to different formats, a weight is not finite, calibration
            does not reach a layer, or something has no packed form; the message says what to change.
        OSError: it cannot be written there, or the disk is full; `directory` is then what it was.
        What one process raises, all raise that share a sharded model.

    Example:
        >>> export_4bit(model, "llama-4bit", tokenizer)  # doctest: +SKIP
        >>> AutoModelForCausalLM.from_pretrained("llama-4bit", dtype="auto")  # doctest: +SKIP
    """
    groups = groups_of(model.parameters())
    with shared_errors(groups):
        config = check_packable(model, dtype, leave_unpackable)
        check_activations(model, activations, calibration)
        if is_main_process:
            check_writable(directory)
    layers = four_bit_layers(model)
    quantizer = config.quantizer("weight")
    assert quantizer is not None  # check_packable refuses weight=None
    native = not activations and has_native_layout(model, config)
    unpacked = set(layers if native else unpackable(layers, quantizer.group_size))
    scheme = compressed_tensors_scheme(quantizer, config.activation if activations else None)
    amax: dict[str, Tensor] = {}
    if activations and config.activation == "nvfp4":
        amax = input_amax(model, layers, calibration)
        check_reached([name for name in layers if name not in unpacked], amax)
    tensors = whole_state_dict(model, dtype)
    check_finite(tensors)
    with torch.no_grad():
        for name, layer in layers.items():
            prefix, weight = f"{name}." if name else "", full(layer.weight)
            if name in unpacked:
                tensors[f"{prefix}weight"] = quantize_weight(weight, layer.recipe, dtype, layer.shared_amax())
                continue
            del tensors[f"{prefix}weight"]
            packed = pack_weight(weight, quantizer, layer.shared_amax(), scheme)
            if name in amax:
                packed["input_global_scale"] = (1.0 / tensor_scale(amax[name])).reshape(1)
            tensors.update({f"{prefix}{key}": value.contiguous() for key, value in packed.items()})
    apart = take_apart(model, tensors)
    rounds_experts = stays_unpacked(model, config, quantizer.group_size) is not None or has_plain_experts(model)
    masters: dict[str, Tensor] = {}  # of the experts, gathered here: what follows is for the main process alone
    if native:
        pack_native(model, tensors, quantizer, scheme)
    else:
        masters = expert_weights(model)
    with shared_errors(groups):
        if not is_main_process:
            return
        quantization = QUANTIZATION_CONFIG if native else _quantization_config(model, scheme, unpacked, apart)
        rounded = rounded_experts(model, masters, dtype)
        tensors.update(rounded if rounds_experts else masters)
        with atomic_folder(directory) as folder:
            _save(model, folder, tensors, quantization, dtype, rounds_experts)
            if not rounds_experts and not native and splits_others(folder, tensors):
                rounds_experts = bool(four_bit_experts(model))
                tensors.update(rounded)
                _save(model, folder, tensors, quantization, dtype, True)
            if four_bit_experts(model) and not rounds_experts and not native:
                packed_experts = pack_experts(folder, model, dict(rounded), quantizer, scheme)
                rounds_experts = not packed_experts
                if packed_experts is None:
                    tensors.update(rounded)
                    _save(model, folder, tensors, quantization, dtype, True)
            if processing_class is not None:
                processing_class.save_pretrained(folder)
        packed_count = len(layers) - len(unpacked)
        announce(
            logger,
            "exported %d packed and %d unpacked layers%s to %s",
            *(packed_count, len(unpacked), _of_experts(model, rounds_experts), directory),
        )


def _quantization_config(model: nn.Module, scheme: Any, unpacked: set[str], apart: list[str]) -> dict[str, Any]:
    """What ``config.json`` says about the packed layers."""
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

    plain = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (name in unpacked or not isinstance(module, FourBitLinear))
    ]
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        format=str(getattr(scheme.format, "value", scheme.format)),
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=[*plain, *apart],
    )
    return json.loads(config.model_dump_json(exclude_none=True))


def _of_experts(model: nn.Module, rounded: bool) -> str:
    count = len(four_bit_experts(model))
    return f" and {count} blocks of experts, {'rounded but not packed' if rounded else 'packed'}," if count else ""


def _save(
    model: nn.Module,
    directory: Path,
    tensors: dict[str, Tensor],
    quantization: dict[str, Any],
    dtype: torch.dtype,
    own_names: bool,
) -> None:
    """Let the model save itself with other tensors, and correct what its config says about them.

    With `own_names` under its parameters' names, and not those of the family's checkpoints: one by one rounded experts
    would be dropped while loading.
    """
    config: Any = model.config
    before = getattr(config, "quantization_config", None)
    config.quantization_config = quantization
    try:
        how = {"save_original_format": False} if own_names else {}
        # A copy: what was written is taken out of it.
        model.save_pretrained(directory, state_dict=dict(tensors), **how)  # type: ignore[operator]
    finally:
        if before is None:
            del config.quantization_config
        else:
            config.quantization_config = before
    path = directory / "config.json"
    written = json.loads(path.read_text())
    written["torch_dtype" if "torch_dtype" in written else "dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
    write_widths(config, directory)
