"""Which layers of PEFT compute ``Q(W + s·B·A)``: those over a 4-bit layer with ``adapters="merged"``.

PEFT is not imported here: where it has not been, there is no adapter.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from hf_stablespam.quant.layers.linear import FourBitLinear

SUPPORTED = "LoRA (lora.Linear), rank-stabilised LoRA and DoRA"


def adopt_adapters(model: nn.Module) -> None:
    """Swap the class of every LoRA layer of `model` over a 4-bit layer with ``adapters="merged"``, in place.

    Raises:
        ValueError: an adapter of another kind, by name.
    """
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None:
        return
    for name, module in model.named_modules():
        if isinstance(module, tuners.BaseTunerLayer):
            adopt_adapter(module, name)


def adopt_adapter(layer: Any, name: str = "") -> None:
    """Swap the class of one layer of PEFT, if it is over a 4-bit layer with ``adapters="merged"``."""
    base = layer.get_base_layer()
    if not isinstance(base, FourBitLinear) or base.four_bit.adapters != "merged":
        return
    from hf_stablespam.quant.layers.merged_lora import MergedLoraLinear, lora

    if type(layer) is lora.Linear:
        layer.__class__ = MergedLoraLinear
    elif not isinstance(layer, MergedLoraLinear):
        raise ValueError(
            f"adapters='merged' knows {SUPPORTED}, got {type(layer).__module__}.{type(layer).__name__}"
            f"{f' in {name}' if name else ''}; use one of these, or adapters='separate'"
        )
    base.adapter = (layer,)
    layer.check_adapters()


def release_adapters(model: nn.Module) -> None:
    """Turn the layers that `adopt_adapters` swapped back into PEFT's own, in place."""
    if "hf_stablespam.quant.layers.merged_lora" not in sys.modules:
        return
    from hf_stablespam.quant.layers.merged_lora import MergedLoraLinear, lora

    for module in model.modules():
        if isinstance(module, MergedLoraLinear):
            layer: Any = module
            layer.forget_merged()
            layer.get_base_layer().adapter = ()
            layer.__class__ = lora.Linear
