"""Adapters of PEFT over 4-bit layers: which of them compute ``Q(W + s·B·A)``, and which cannot be used at all.

PEFT is not imported here: where it has not been, there is no adapter.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from hf_stablespam.quant.layers.checks import check_partners
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


def adapter_parts(model: nn.Module) -> set[str]:
    """Names of the modules of PEFT's adapters in `model`, without the layers and the model that they adapt."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    parts: set[str] = set()
    if tuners is None:
        return parts
    for name, module in model.named_modules():
        if isinstance(module, tuners.BaseTunerLayer):
            own = [child for child, _ in module.named_children() if child != "base_layer"]
        elif isinstance(module, tuners.BaseTuner):  # Shadow has a network beside the model, X-LoRA a classifier
            own = [child for child, _ in module.named_children() if child not in ("model", "lora_model")]
        elif hasattr(module, "peft_config") and hasattr(module, "prompt_encoder"):
            own = ["prompt_encoder"]
        else:
            continue
        for child in own:
            below = (inner for inner, _ in module.get_submodule(child).named_modules(prefix=child))
            parts |= {f"{name}.{inner}" if name else inner for inner in below}
    return parts


def check_adapters(model: nn.Module, trained: Collection[str] | None = None) -> None:
    """Raise unless every adapter of `model` over a 4-bit layer computes with what that layer gives.

    HRA, SHiRA and some others multiply by a changed copy of the weight instead: nothing of it would be in 4 bits. One
    layer of each kind is tried on a row of zeros, with zeros and with ones in the place of the 4-bit product. DoRA
    with dropout scales the product by (m - 1) anew, with the weight itself.

    Args:
        model: any module.
        trained: names of the adapters that are going to be trained; default: those that are active and either have a
            gradient or are in training.

    Raises:
        ValueError: a kind of adapter that does not, with the name of its first layer; or see `check_partners`.
    """
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None:
        return
    check_partners(model)
    tried: set[type] = set()
    for name, module in model.named_modules():
        if not isinstance(module, tuners.BaseTunerLayer):
            continue
        base: Any = module.get_base_layer()
        if not isinstance(base, FourBitLinear) or base.adapter:
            continue
        _check_dora(module, name, trained)
        if type(module) not in tried:
            tried.add(type(module))
            if not _uses(module, base):
                kind = f"{type(module).__module__}.{type(module).__name__}"
                raise ValueError(
                    f"{name} is an adapter ({kind}) that makes no use of the 4-bit layer under it but computes with"
                    " its weight, or a copy, itself: nothing of that would be in 4 bits; use an adapter that adds to"
                    " the layer's output, such as LoRA, or name the layer in modules_to_not_convert"
                )


def _check_dora(adapter: Any, name: str, trained: Collection[str] | None) -> None:
    """Raise if a DoRA that is trained, or whose layer is in training, drops numbers of its input."""
    for which, magnitude in (getattr(adapter, "lora_magnitude_vector", None) or {}).items():
        dropout = adapter.lora_dropout[which]
        active = which in adapter.active_adapters and (adapter.training or magnitude.weight.requires_grad)
        used = active if trained is None else which in trained
        if used and not isinstance(dropout, nn.Identity):
            raise ValueError(
                f"{name}: lora_dropout must be 0 for DoRA over a 4-bit layer, got {getattr(dropout, 'p', dropout)} for"
                f" {which!r}: in training PEFT would multiply by the weight that is not rounded, in evaluation by the"
                " 4-bit one; set lora_dropout=0, or use_dora=False"
            )


def _uses(adapter: Any, base: FourBitLinear) -> bool:
    """Whether what an adapter gives depends on what the layer under it gives; True where it cannot be tried."""
    try:
        low, high = (_given(adapter, base, value) for value in (0.0, 1.0))
        return bool((high - low).abs().max() > 1 / 16)  # GLoRA subtracts it again, which rounding may show
    except Exception:  # an adapter with arguments of its own, or on the meta device
        return True


def _given(adapter: Any, base: FourBitLinear, value: float) -> torch.Tensor:
    """What an adapter makes of a row of zeros where the layer under it gives `value`."""
    device = base.weight.device
    row = torch.zeros(1, 1, base.in_features, dtype=base.weight.dtype, device=device)
    own = base.__dict__
    before = {"forward": own["forward"]} if "forward" in own else {}  # where hooks of accelerate stand
    own["forward"] = lambda x, *args, **kwargs: x.new_full((*x.shape[:-1], base.out_features), value)
    kind = device.type if device.type in ("cuda", "xpu") else ""
    try:  # dropout draws numbers, on which those of the run must not depend
        with torch.no_grad(), torch.random.fork_rng([device] if kind else [], device_type=kind or "cuda"):
            given: torch.Tensor = adapter(row)
            return given
    finally:
        del own["forward"]
        own.update(before)


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
            layer.get_base_layer().adapter = ()
            layer.get_base_layer().forget_weight()
            layer.__class__ = lora.Linear
