"""Which layers of a model `FourBitConfig` asks for, and in which groups their rows are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from hf_stablespam.quant.config import FourBitConfig
from hf_stablespam.quant.formats.number_formats import get_format
from hf_stablespam.quant.high_precision import high_precision_layers
from hf_stablespam.quant.layers.adapters import adapter_parts
from hf_stablespam.quant.layers.experts import is_experts, weight_names
from hf_stablespam.quant.layers.linear import FourBitLinear

# Groups that `group_size="auto"` tries; all of them can be packed, and fast kernels know them.
AUTO_GROUPS = (128, 64, 32)
# What PEFT trains beside adapters that are layers of its own, and an adapter of ours.
TRAINED_WHOLE = re.compile(r"(^|\.)(parallel_adapter_|modules_to_save)")
# What PEFT puts into the name of a layer that has an adapter, and of all others.
ADAPTED = re.compile(r"^base_model\.model\.|\.base_layer(?=\.|$)")


def target_layers(model: nn.Module, config: FourBitConfig) -> dict[str, nn.Module]:
    """The linear layers and blocks of experts that the configuration asks for, converted already or not.

    Raises:
        ValueError: `keep_last_blocks`, of a model without a list of blocks.
    """
    high_precision, kept = high_precision_layers(model), _kept_blocks(model, config.keep_last_blocks)
    adapters = adapter_parts(model)
    wanted = {}
    for name, module in model.named_modules():
        if not _can_be_4bit(module) or is_adapter(name, adapters):
            continue
        if _matches(name, config.modules_to_not_convert):
            continue
        if any(_is_named(container, config.modules_to_not_convert) for container in _containers(name)):
            continue
        if config.target_modules is not None and not _matches(name, config.target_modules):
            continue
        if name in high_precision and not _is_named(name, config.target_modules or ()):
            continue
        if not any(name.startswith(block + ".") for block in kept):
            wanted[name] = module
    return wanted


def unmatched(model: nn.Module, config: FourBitConfig) -> list[str]:
    """Patterns of the configuration, beside those that it has by default, that do nothing.

    `modules_to_not_convert` may name what holds layers; all else, regular expressions too, must match a layer.
    """
    defaults = FourBitConfig().modules_to_not_convert
    modules = dict(model.named_modules())
    layers = [name for name, module in modules.items() if _can_be_4bit(module)]
    left = [x for x in config.modules_to_not_convert if x not in defaults]
    idle = [x for x in (*(config.target_modules or ()), *left) if not any(_matches(name, (x,)) for name in layers)]
    return [x for x in idle if x not in left or not any(_is_named(name, (x,)) for name in modules)]


def is_adapter(name: str, adapters: set[str]) -> bool:
    """Whether a module belongs to an adapter: these are small, and trained in full precision."""
    return name in adapters or TRAINED_WHOLE.search(name) is not None


def with_group_size(config: FourBitConfig, layers: Mapping[str, nn.Module]) -> FourBitConfig:
    """The configuration with a number in the place of ``group_size="auto"``.

    Raises:
        ValueError: no group fits the rows of all `layers`; the message names those that none fits.
    """
    if config.group_size != "auto":
        return config
    formats = [name for name in (config.weight, config.activation, config.gradient) if name is not None]
    if all(get_format(name).block for name in formats):  # the formats have groups of their own
        return replace(config, group_size=AUTO_GROUPS[0])
    widths = {name: _row_lengths(layer) for name, layer in layers.items()}
    for size in AUTO_GROUPS:
        if all(width % size == 0 for lengths in widths.values() for width in lengths):
            return replace(config, group_size=size)
    odd = {name: lengths for name, lengths in widths.items() if any(width % AUTO_GROUPS[-1] for width in lengths)}
    raise ValueError(
        f"group_size='auto' must find one of {', '.join(map(str, AUTO_GROUPS))} that divides the inputs of every layer,"
        f" but {', '.join(f'{name} has {max(lengths)}' for name, lengths in odd.items())}; name these layers in"
        " modules_to_not_convert, or give a number (the last group of a row is then smaller, and cannot be packed)"
    )


def _can_be_4bit(module: nn.Module) -> bool:
    """Whether it is of a kind that is converted, or is converted already."""
    return type(module) is nn.Linear or isinstance(module, FourBitLinear) or is_experts(module)


def _row_lengths(layer: nn.Module) -> list[int]:
    """Numbers of inputs of a linear layer's, or of the experts', matrices."""
    if isinstance(layer, nn.Linear):
        return [layer.in_features]
    inputs = -2 if layer.is_transposed else -1
    return [getattr(layer, name).shape[inputs] for name in weight_names(layer)]


def _containers(name: str) -> list[str]:
    """Names of the modules that a module is in, but for the model itself."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    """A pattern is the whole name, its end after a dot, or a regular expression for all of it."""
    names = {name, ADAPTED.sub("", name)}
    return _is_named(name, patterns) or any(re.fullmatch(pattern, one) for pattern in patterns for one in names)


def _is_named(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a pattern is the layer's name or its end: a regular expression for many layers names none of them.

    The name with and without what PEFT has put into it.
    """
    names = (name, ADAPTED.sub("", name))
    return any(one == pattern or one.endswith("." + pattern) for pattern in patterns for one in names)


def _kept_blocks(model: nn.Module, count: int) -> list[str]:
    """Names of the last `count` children of every longest list of blocks (encoder and decoder have one each)."""
    if count == 0:
        return []
    lists = {name: child for name, child in model.named_modules() if isinstance(child, nn.ModuleList) and len(child)}
    # Lists inside of blocks (a block's experts or sub-layers) are no lists of blocks.
    outer = [name for name in lists if not any(name.startswith(other + ".") for other in lists)]
    if not outer:
        raise ValueError(
            f"keep_last_blocks={count} needs an nn.ModuleList of blocks, and {type(model).__name__} has none: it would"
            " count for nothing; name the blocks in modules_to_not_convert instead"
        )
    return [f"{name}.{index}" for name in outer for index in range(max(0, len(lists[name]) - count), len(lists[name]))]
