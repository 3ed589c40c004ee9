"""Compensated prefix tuning: the PEFT layer, its attention function, and the tuner that puts it in."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import register_peft_method
from torch import nn
from transformers import AttentionInterface

from hf_stablespam.recipes.lae.methods.config import CalibratedPrefixConfig, peft_type
from hf_stablespam.recipes.lae.methods.prefix_attention import Prefix, prefix_attention
from hf_stablespam.recipes.lae.methods.scalar import is_active, learnable_scalar
from hf_stablespam.recipes.lae.methods.tuner import WrappingTuner

_NAME = "calibrated_prefix"  # of our function in transformers' attention interface
_KEY_PROJECTIONS = ("k_proj", "key", "k")
_BY_TYPE = {
    **{name: ["attention"] for name in ("vit", "dinov2")},
    "bert": ["self"],
    **{name: ["self_attn"] for name in ("llama", "mistral", "qwen2", "qwen3")},
}


class CalibratedPrefixLayer(nn.Module, BaseTunerLayer):
    """An attention whose keys and values gain the tokens of the active adapter.

    While it runs, the attention's configuration names our function in transformers' attention interface, which in turn
    calls the function that the configuration had named.
    """

    adapter_layer_names = (
        "calibrated_prefix_key",
        "calibrated_prefix_value",
        "calibrated_prefix_key_scale",
        "calibrated_prefix_value_scale",
    )
    other_param_names = ("fixed_scale", "compensate")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: CalibratedPrefixConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.projection = _key_projection(base_layer)
        self.calibrated_prefix_key = nn.ParameterDict()
        self.calibrated_prefix_value = nn.ParameterDict()
        self.calibrated_prefix_key_scale = nn.ParameterDict()
        self.calibrated_prefix_value_scale = nn.ParameterDict()
        self.fixed_scale: dict[str, float | None] = {}
        self.compensate: dict[str, bool] = {}
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: CalibratedPrefixConfig) -> None:
        """Add an adapter of its own name."""
        projection: Any = getattr(self.base_layer, self.projection)
        weight = projection.weight
        place: dict[str, Any] = {
            "device": weight.device,
            "dtype": weight.dtype if weight.is_floating_point() else None,
        }
        shape = (config.num_virtual_tokens, projection.out_features)
        for tokens in (self.calibrated_prefix_key, self.calibrated_prefix_value):
            tokens[adapter_name] = nn.Parameter(torch.empty(shape, **place).uniform_(0, 0.01))
        self.fixed_scale[adapter_name] = config.scale
        self.compensate[adapter_name] = config.compensate
        if config.scale is None:
            for scale in (self.calibrated_prefix_key_scale, self.calibrated_prefix_value_scale):
                scale[adapter_name] = learnable_scalar(**place)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def prefix(self, name: str, function: str | None) -> Prefix:
        """The tokens of the adapter `name`, times their scalars."""
        key, value, fixed = self.calibrated_prefix_key[name], self.calibrated_prefix_value[name], self.fixed_scale[name]
        key_scale = self.calibrated_prefix_key_scale[name] if fixed is None else fixed
        value_scale = self.calibrated_prefix_value_scale[name] if fixed is None else fixed
        return Prefix(key * key_scale, value * value_scale, self.compensate[name], function)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        active = [name for name in self.active_adapters if is_active(self, name, self.calibrated_prefix_key)]
        if not active:
            return self.base_layer(*inputs, **named)
        if len(active) > 1:
            raise ValueError(f"one prefix can be active at a time, got {active}; call set_adapter with one name")
        attention: Any = self.base_layer
        config = attention.config
        prefix = self.prefix(active[0], config._attn_implementation)
        attention.config = copy.copy(config)
        attention.config._attn_implementation_internal = _NAME
        attention.calibrated_prefix = prefix
        try:
            output = attention(*inputs, **named)
        finally:
            attention.config = config
            del attention.calibrated_prefix
        if not prefix.used:
            raise ValueError(
                f"{type(attention).__name__} does not use transformers' attention interface, so its prefix had no "
                "effect; name the modules that call it in target_modules, or use a ParallelAdapterConfig"
            )
        return output

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError("a prefix cannot be merged into the backbone's weights; keep the PeftModel")


class CalibratedPrefixModel(WrappingTuner):
    """The tuner that PEFT makes for a `CalibratedPrefixConfig`."""

    prefix = "calibrated_prefix_"
    tuner_layer_cls = CalibratedPrefixLayer
    target_module_mapping = _BY_TYPE


def _key_projection(attention: nn.Module) -> str:
    """The name of the attention's key projection."""
    for name in _KEY_PROJECTIONS:
        if hasattr(getattr(attention, name, None), "out_features") and hasattr(attention, "config"):
            return name
    raise ValueError(
        f"target_modules: {type(attention).__name__} has no key projection ({', '.join(_KEY_PROJECTIONS)}) and config "
        "of its own; name the modules that have them, or use a ParallelAdapterConfig"
    )


peft_type("calibrated_prefix")
register_peft_method(name="calibrated_prefix", config_cls=CalibratedPrefixConfig, model_cls=CalibratedPrefixModel)
AttentionInterface.register(_NAME, prefix_attention)
