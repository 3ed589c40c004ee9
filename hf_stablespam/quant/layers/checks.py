"""What must hold of a layer before it is converted, restored or trained."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def check_partners(model: nn.Module) -> None:
    """Raise if a layer of `model` shares its scale with layers of another model.

    A copy of a single layer, as PEFT makes it for ``modules_to_save``, comes with copies of its siblings, which nobody
    trains: its weight would be rounded by what they were.

    Raises:
        ValueError: the name of the first such layer.
    """
    present = {id(module) for module in model.modules()}
    for name, layer in model.named_modules():
        partners = layer.__dict__.get("scale_partners", ())  # not of a wrapper that hands attributes on
        if any(id(other) not in present for other in partners):
            raise ValueError(
                f"{name} is a copy of a 4-bit layer that shares one NVFP4 scale with its siblings, without these; take"
                " it out of modules_to_save (LoRA's target_modules can train it), or name it and them in"
                " modules_to_not_convert"
            )


def check_class(layer: nn.Module, expected: Any, name: str = "") -> None:
    """Raise if another class, such as that of a parametrization, was put over a converted layer's.

    Args:
        layer: what is going to get its former class back.
        expected: the class that it was converted to.
        name: its name in the model.
    """
    if type(layer) is not expected:
        raise ValueError(
            f"a layer{f' {name!r}' if name else ''} must be a {expected.__name__} to be restored, got"
            f" {type(layer).__name__}, which came after the conversion and would be lost; take it away first"
            " (torch.nn.utils.parametrize.remove_parametrizations), then call restore_linear"
        )


def check_experts(model: nn.Module) -> None:
    """Raise if experts are packed for inference, as transformers keeps GPT-OSS's where it finds kernels for them."""
    for name, module in model.named_modules():
        if type(module).__name__ == "Mxfp4GptOssExperts":
            raise ValueError(
                f"{name} must hold its weights as numbers to be trained in 4 bits, got packed MXFP4; load the model"
                " with from_pretrained(..., quantization_config=Mxfp4Config(dequantize=True)) of transformers"
            )


def check_weight(weight: Tensor, name: str = "weight") -> None:
    """Raise unless `weight` is a floating-point matrix."""
    if not weight.is_floating_point():
        raise TypeError(
            f"{name} must be floating-point to be trained in 4 bits, got {weight.dtype}; it may be quantized already:"
            " load the model in bfloat16, or name the layer in modules_to_not_convert"
        )
    if weight.ndim != 2:
        raise ValueError(
            f"{name} must be a matrix (out_features, in_features), got shape {tuple(weight.shape)}; flattened weights"
            " (FSDP1, ZeRO-3) cannot be quantized: use FSDP2 or DDP, or convert before wrapping"
        )
