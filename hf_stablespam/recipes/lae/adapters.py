"""The two experts in one `PeftModel`: made, found, copied, and switched between."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from hf_stablespam.recipes.lae.methods.calibrated_lora import CalibratedLinear
from hf_stablespam.recipes.lae.methods.config import CalibratedPrefixConfig, ParallelAdapterConfig

ONLINE, OFFLINE = "default", "offline"
_VARIANTS = ("mica",)  # values of init_lora_weights that say how LoRA computes, not only where it starts


def add_lae_adapters(model: nn.Module, config: PeftConfig, *, calibrate: bool = True, name: str = ONLINE) -> PeftModel:
    """Give `model` the online expert: a PEFT adapter, with learnable scalars if calibrated.

    The offline expert is added by `LAECallback` before the second task.

    Args:
        model: the pretrained backbone, which PEFT freezes. Its layers may be 4-bit.
        config: `LoraConfig`, `ParallelAdapterConfig` or `CalibratedPrefixConfig`; with `calibrate=False` any method of
            PEFT that works inside of layers. The paper's LoRA is `LoraConfig(r=5, lora_alpha=5, target_modules=
            ["k_proj", "v_proj"], layers_to_transform=[0, 1, 2, 3, 4], layers_pattern="layers")`.
        calibrate: a learnable scalar times each module, 1 at the start (the paper's adaptation-speed calibration). A
            number given as `scale` of the configuration stays fixed. False: no scalars.
        name: of the adapter, which `LAECallback(online=...)` then gets.

    Returns:
        The `PeftModel`; `LAEModel` takes it.

    Raises:
        ValueError: a method or a layer that cannot be calibrated, prompt learning, a task type that brings heads of
            its own, biases of the backbone to be trained, or a model that has adapters already.

    Example:
        >>> from transformers import ViTConfig, ViTModel
        >>> vit = ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8,
        ...                          image_size=8, patch_size=4))
        >>> model = add_lae_adapters(vit, LoraConfig(r=2, lora_alpha=2, target_modules=["k_proj", "v_proj"]))
        >>> len(adapter_parameters(model, "default"))  # A, B and a scalar, for keys and values of two layers
        12
    """
    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("model has PEFT adapters already; pass the backbone without them")
    if config.is_prompt_learning:
        raise ValueError(f"{type(config).__name__} puts tokens before the input; take a CalibratedPrefixConfig instead")
    if config.task_type is not None or getattr(config, "modules_to_save", None):
        raise ValueError(
            f"config has task_type={config.task_type} and modules_to_save={getattr(config, 'modules_to_save', None)}; "
            "leave both out: IncrementalClassifier holds the heads"
        )
    if isinstance(bias := getattr(config, "bias", None), str) and bias != "none":
        raise ValueError(
            f"bias must be 'none', got {bias!r}: the backbone's own biases belong to no expert and would be neither"
            " trained nor averaged; leave bias out"
        )
    peft_model = get_peft_model(model, _prepared(config, calibrate), adapter_name=name)
    if calibrate and isinstance(config, LoraConfig):
        _check_all_calibrated(peft_model)
    return peft_model


def add_expert(peft_model: PeftModel, name: str, like: str = ONLINE) -> None:
    """Add an adapter `name` that is a frozen copy of the adapter `like`; trainability and what is active stay."""
    config: Any = copy.deepcopy(peft_model.peft_config[like])
    config.inference_mode = True
    start = getattr(config, "init_lora_weights", None)
    if isinstance(start, str) and start not in _VARIANTS:
        config.init_lora_weights = True  # PiSSA, OLoRA and others would take their start out of the backbone once more
    before = [(parameter, parameter.requires_grad) for parameter in peft_model.parameters()]
    with torch.random.fork_rng(devices=[]):  # what it starts from is overwritten: the run's random numbers stay
        peft_model.add_adapter(name, config)
    if start is not None:
        config.init_lora_weights = start  # PEFT keeps this object and saves it
    for parameter, requires_grad in before:
        parameter.requires_grad_(requires_grad)
    for parameter in adapter_parameters(peft_model, name).values():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))  # 1e-4 of a bf16 is 0
    for module in peft_model.modules():
        if isinstance(module, LNTuningLayer) and name in module.ln_tuning_layers:
            _take_any_dtype(module.ln_tuning_layers[name])
    copy_expert(peft_model, like, name)


@torch.no_grad()
def copy_expert(peft_model: PeftModel, source: str, target: str) -> None:
    """Copy the values of one adapter to another."""
    values = adapter_parameters(peft_model, source)
    for key, parameter in adapter_parameters(peft_model, target).items():
        parameter.copy_(values[key])


def adapter_parameters(peft_model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """All parameters of the adapter `name`, under keys that are the same for every adapter."""
    found: dict[str, nn.Parameter] = {}
    for place, held in adapter_places(peft_model).items():
        if name not in held:
            continue
        entry = held[name]
        if isinstance(entry, nn.Parameter):
            found[place] = entry
        elif isinstance(entry, nn.Module):
            found.update({f"{place}.{key}": value for key, value in entry.named_parameters()})
    return found


def adapter_places(peft_model: nn.Module) -> dict[str, Any]:
    """Where adapters have their parameters: the containers of all layers, each with an entry per adapter."""
    return {
        f"{path}.{container}": held
        for path, module in peft_model.named_modules()
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        for container in module.adapter_layer_names
        if hasattr(held := getattr(module, container, None), "keys")
    }


def check_experts(peft_model: PeftModel, *names: str) -> None:
    """Raise a ValueError unless the model has all adapters, they are different ones, and of the same shapes."""
    present = sorted(peft_model.peft_config)
    for name in names:
        if name not in peft_model.peft_config:
            raise ValueError(f"the model has no adapter {name!r}, only {present}; add_lae_adapters makes {ONLINE!r}")
    if len(set(names)) != len(names):
        raise ValueError(f"online and offline must be two adapters, got {names[0]!r} for both; present: {present}")
    shapes = {name: {key: tuple(p.shape) for key, p in adapter_parameters(peft_model, name).items()} for name in names}
    for name in names[1:]:
        differ = [key for key, _ in shapes[names[0]].items() ^ shapes[name].items()]
        if differ:
            raise ValueError(
                f"adapters {names[0]!r} and {name!r} differ in {len(set(differ))} parameters, first "
                f"{sorted(differ)[0]}; make both with the same configuration"
            )


@contextmanager
def active_expert(peft_model: PeftModel, name: str) -> Iterator[None]:
    """Make one adapter the active one inside of `with`; afterwards all is as before, what is trainable too."""
    active = list(peft_model.active_adapters)
    before = [(parameter, parameter.requires_grad) for parameter in peft_model.parameters()]
    try:
        peft_model.base_model.set_adapter([name])  # type: ignore[operator]
        yield
    finally:
        peft_model.base_model.set_adapter(active)  # type: ignore[operator]
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)


def is_calibrated(peft_model: PeftModel) -> bool:
    """With which `calibrate` `add_lae_adapters` makes these adapters from their configuration."""
    own = (ParallelAdapterConfig, CalibratedPrefixConfig)
    if any(isinstance(config, own) for config in peft_model.peft_config.values()):
        return True
    return any(isinstance(module, CalibratedLinear) for module in peft_model.modules())


def _take_any_dtype(norm: nn.Module) -> None:
    """Compute in the dtype of the norm's weights and answer in that of its input: LN tuning alone replaces a layer."""
    norm.register_forward_pre_hook(_widen)
    norm.register_forward_hook(_narrow)


def _widen(norm: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    norm.input_dtype = args[0].dtype
    return (args[0].to(torch.promote_types(args[0].dtype, norm.weight.dtype)), *args[1:])


def _narrow(norm: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output.to(norm.input_dtype)


def _prepared(config: PeftConfig, calibrate: bool) -> PeftConfig:
    """A copy of the configuration, with scalars switched on or off."""
    config = copy.deepcopy(config)
    if isinstance(config, (ParallelAdapterConfig, CalibratedPrefixConfig)):
        if not calibrate and config.scale is None:
            config = replace(config, scale=1.0)
    elif calibrate and isinstance(config, LoraConfig):
        config._register_custom_module({nn.Linear: CalibratedLinear})
    elif calibrate:
        raise ValueError(
            f"calibrate=True knows LoraConfig, ParallelAdapterConfig and CalibratedPrefixConfig, got "
            f"{type(config).__name__}; pass calibrate=False"
        )
    return config


def _check_all_calibrated(peft_model: PeftModel) -> None:
    plain = [
        f"{name} ({type(module.get_base_layer()).__name__})"
        for name, module in peft_model.named_modules()
        if isinstance(module, LoraLayer) and not isinstance(module, CalibratedLinear)
    ]
    if plain:
        raise ValueError(f"calibrate=True scales LoRA on nn.Linear only, got {plain[0]}; pass calibrate=False")
