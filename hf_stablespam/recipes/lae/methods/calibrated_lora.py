"""LoRA with a learnable scalar on each of its products."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.lora.layer import LoraVariant
from torch import nn

from hf_stablespam.recipes.lae.methods.scalar import learnable_scalar


class CalibratedLinear(lora.Linear):
    """$Wx + s\\,\\frac{\\alpha}{r} BAx$ with a learnable $s$ for each adapter, 1 at the start."""

    adapter_layer_names = (*lora.Linear.adapter_layer_names, "lora_scale")

    def update_layer(self, adapter_name: str, *arguments: Any, **options: Any) -> None:
        if not hasattr(self, "lora_scale"):
            self.lora_scale = nn.ParameterDict()
        super().update_layer(adapter_name, *arguments, **options)

    def resolve_lora_variant(self, **options: Any) -> LoraVariant:
        if super().resolve_lora_variant(**options) is not None:
            raise ValueError("calibrate=True goes with plain LoRA; leave out the variant (use_dora …), or calibrate")
        return CalibratedVariant()

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        return super().get_delta_weight(adapter) * self.lora_scale[adapter]


class CalibratedVariant(LoraVariant):
    """What PEFT calls in place of plain LoRA's forward pass and merging."""

    @staticmethod
    def init(module: Any, adapter_name: str, **options: Any) -> None:
        weight = module.lora_A[adapter_name].weight
        module.lora_scale[adapter_name] = learnable_scalar(weight.device, weight.dtype)

    @staticmethod
    def forward(
        module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        down, up = module.lora_A[active_adapter], module.lora_B[active_adapter]
        x = module._cast_input_dtype(x, down.weight.dtype)
        factor = module.lora_scale[active_adapter] * module.scaling[active_adapter]
        return result + up(down(module.lora_dropout[active_adapter](x))) * factor

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        return orig_weight + module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> None:
        orig_weight.data += module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        return orig_weight - module.get_delta_weight(active_adapter).to(orig_weight.dtype)
