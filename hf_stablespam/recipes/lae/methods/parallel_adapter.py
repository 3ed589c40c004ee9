"""A bottleneck in parallel to a module: the PEFT layer, and the tuner that puts it in."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import register_peft_method
from torch import nn

from hf_stablespam.recipes.lae.methods.config import ParallelAdapterConfig, peft_type
from hf_stablespam.recipes.lae.methods.scalar import is_active, learnable_scalar
from hf_stablespam.recipes.lae.methods.tuner import WrappingTuner

_BY_TYPE = {
    **{name: ["attention"] for name in ("vit", "dinov2")},
    **{name: ["self_attn"] for name in ("llama", "mistral", "qwen2", "qwen3")},
}


class ParallelAdapterLayer(nn.Module, BaseTunerLayer):
    """`base_layer(x) + scale * up(GELU(down(x)))` for each active adapter; x is the first input of `base_layer`."""

    adapter_layer_names = ("parallel_adapter_down", "parallel_adapter_up", "parallel_adapter_scale")
    other_param_names = ("fixed_scale",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: ParallelAdapterConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features, self.channels_first = _widths(base_layer)
        self.parallel_adapter_down = nn.ModuleDict()
        self.parallel_adapter_up = nn.ModuleDict()
        self.parallel_adapter_scale = nn.ParameterDict()
        self.fixed_scale: dict[str, float | None] = {}
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: ParallelAdapterConfig) -> None:
        """Add an adapter of its own name."""
        first = next(self.base_layer.parameters())
        place: dict[str, Any] = {"device": first.device, "dtype": first.dtype if first.is_floating_point() else None}
        width = config.bottleneck(self.in_features)
        down = nn.Linear(self.in_features, width, **place)
        up = nn.Linear(width, self.out_features, **place)
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
        for zero in (down.bias, up.weight, up.bias):
            nn.init.zeros_(zero)
        self.parallel_adapter_down[adapter_name] = down
        self.parallel_adapter_up[adapter_name] = up
        self.fixed_scale[adapter_name] = config.scale
        if config.scale is None:
            self.parallel_adapter_scale[adapter_name] = learnable_scalar(**place)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        output = self.base_layer(*inputs, **named)
        x = inputs[0] if inputs else named["hidden_states"]
        first = output[0] if isinstance(output, tuple) else output
        for name in self.active_adapters:
            if is_active(self, name, self.parallel_adapter_down):
                first = first + self.bottleneck(x, name).to(first.dtype)
        return (first, *output[1:]) if isinstance(output, tuple) else first

    def bottleneck(
        self,
        x: torch.Tensor,  # (..., in_features), or (batch, in_features, height, width) beside a convolution
        name: str,
    ) -> torch.Tensor:
        """What the adapter `name` adds."""
        down: Any = self.parallel_adapter_down[name]
        up = self.parallel_adapter_up[name]
        x = (x.movedim(1, -1) if self.channels_first else x).to(down.weight.dtype)
        added = up(nn.functional.gelu(down(x)))
        fixed = self.fixed_scale[name]
        added = added * (self.parallel_adapter_scale[name] if fixed is None else fixed)
        return added.movedim(-1, 1) if self.channels_first else added

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError("a parallel adapter is not linear and cannot be merged into the backbone; keep the PeftModel")


class ParallelAdapterModel(WrappingTuner):
    """The tuner that PEFT makes for a `ParallelAdapterConfig`."""

    prefix = "parallel_adapter_"
    tuner_layer_cls = ParallelAdapterLayer
    target_module_mapping = _BY_TYPE


def _widths(base_layer: nn.Module) -> tuple[int, int, bool]:
    """Features of input and output, and whether they are a convolution's channels: from the first layer inside."""
    if isinstance(base_layer, nn.Linear):
        return base_layer.in_features, base_layer.out_features, False
    for module in base_layer.modules():
        if isinstance(module, nn.Linear):
            return module.in_features, module.in_features, False
        if isinstance(module, nn.Conv2d):
            return module.in_channels, module.in_channels, True
    raise ValueError(
        f"target_modules: {type(base_layer).__name__} has no linear layer or convolution whose width a parallel "
        "adapter could take; name attention modules"
    )


peft_type("parallel_adapter")
register_peft_method(name="parallel_adapter", config_cls=ParallelAdapterConfig, model_cls=ParallelAdapterModel)
