"""Loading a model whose layers differ in width, as `hf_stablespam.quant.export.widths` notes it beside its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from hf_stablespam.quant.export.widths import note_counts, read_widths, text_config

# Projection of a layer → the width that it has, and along which dimension.
_PROJECTIONS = {
    **{f"mlp.{name}": ("intermediate_size", dim) for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1))},
    **{f"self_attn.{name}_proj": ("kv_heads", dim) for name, dim in (("q", 0), ("k", 0), ("v", 0), ("o", 1))},
}


def load_widths(model_class: Any, folder: Path, **kwargs: Any) -> Any:
    """``model_class.from_pretrained`` for a folder with a note of widths.

    Args:
        model_class: of transformers, the one that was saved.
        folder: with the model.
        kwargs: of ``from_pretrained``.

    Returns:
        What ``from_pretrained`` returns; the model is of `model_class`.

    Raises:
        ValueError: the widths are not those of such a model.
    """
    widths, options = read_widths(folder)
    config = kwargs.pop("config", None) or transformers.AutoConfig.for_model(**options)
    found = _sized(model_class, widths).from_pretrained(folder, config=config, **kwargs)
    model = found[0] if isinstance(found, tuple) else found
    model.__class__ = model_class
    return found


def _sized(base: Any, widths: Sequence[Mapping[str, int]]) -> Any:
    """A subclass whose models are born with these widths, before anybody loads weights into them."""

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        resize(self, widths)

    return type(base.__name__, (base,), {"__init__": __init__, "__module__": base.__module__})


def resize(model: Any, widths: Sequence[Mapping[str, int]]) -> None:
    """Narrow the layers of a model whose weights do not matter, as its config builds it, to these widths.

    Args:
        model: with layers of Llama's shape.
        widths: ``intermediate_size`` and ``kv_heads`` of every layer.

    Raises:
        ValueError: they do not fit the model.
    """
    layers: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        layer, _, projection = name.rpartition(".")
        layer, _, part = layer.rpartition(".")
        if f"{part}.{projection}" in _PROJECTIONS:
            layers.setdefault(layer, {})[f"{part}.{projection}"] = module
    found = {name: own for name, own in layers.items() if own.keys() == _PROJECTIONS.keys()}
    if len(found) != len(widths):
        raise ValueError(f"the note of widths must have one entry per layer, got {len(widths)} for {len(found)} layers")
    config = text_config(model.config)
    heads = config.num_attention_heads
    built = {"intermediate_size": config.intermediate_size, "kv_heads": config.num_key_value_heads or heads}
    narrowed: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # the old one is held, so that its id stays taken
    for (name, own), width in zip(found.items(), widths, strict=True):
        for kind, number in built.items():
            if not 1 <= width[kind] <= number:
                raise ValueError(f"the width {kind} of {name} must be from 1 to {number}, got {width[kind]}")
        for projection, linear in own.items():
            kind, dim = _PROJECTIONS[projection]
            _narrow(linear, dim, width[kind], built[kind], narrowed)
        layer = model.get_submodule(name)
        note_counts(layer.mlp, intermediate_size=width["intermediate_size"])
        queries = width["kv_heads"] * heads // built["kv_heads"]
        note_counts(
            layer.self_attn, num_key_value_heads=width["kv_heads"], num_heads=queries, num_attention_heads=queries
        )


def _narrow(
    linear: Any, dim: int, units: int, built: int, narrowed: dict[int, tuple[nn.Parameter, nn.Parameter]]
) -> None:
    """Leave so many of the units that the projection was built with."""
    for name, parameter in list(linear.named_parameters(recurse=False)):
        if dim and name == "bias":
            continue  # one number per output, all of which stay
        if id(parameter) not in narrowed:  # else tied to one of before
            part = parameter.detach().narrow(dim, 0, parameter.shape[dim] * units // built).clone()
            narrowed[id(parameter)] = (parameter, nn.Parameter(part, requires_grad=parameter.requires_grad))
        setattr(linear, name, narrowed[id(parameter)][1])
    linear.out_features, linear.in_features = linear.weight.shape
