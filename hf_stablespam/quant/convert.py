"""A model → the same model with 4-bit linear layers, and back."""

from __future__ import annotations

import logging
import re
from collections import Counter
from typing import Any, TypeVar

from torch import nn

from hf_stablespam._announce import announce
from hf_stablespam.quant.config import FourBitConfig
from hf_stablespam.quant.direct_reads import directly_read
from hf_stablespam.quant.formats.number_formats import ScaleKind
from hf_stablespam.quant.high_precision import high_precision_layers
from hf_stablespam.quant.layers.adapters import adapter_parts, adopt_adapters, check_adapters, release_adapters
from hf_stablespam.quant.layers.checks import check_class, check_experts, check_weight
from hf_stablespam.quant.layers.experts import FourBitExperts, four_bit_class, is_experts
from hf_stablespam.quant.layers.instance_forward import check_forward
from hf_stablespam.quant.layers.linear import FourBitLinear
from hf_stablespam.quant.parameter_counts import in_words
from hf_stablespam.quant.target_layers import is_adapter, target_layers, unmatched, with_group_size

logger = logging.getLogger(__name__)

ModelT = TypeVar("ModelT", bound=nn.Module)

# The key under which a converted model's own config says how it was trained; `save_pretrained` writes it.
CONFIG_KEY = "four_bit_training"

# Inference engines fuse these siblings into one product, with one NVFP4 scale.
FUSED_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"))

# Packages whose layers transformers puts in for 4-bit training (FourOverSixConfig, FPQuantConfig).
PREPARED_BY = ("fouroversix", "fp_quant")
# Weights that nobody expects to be converted go unmentioned.
QUIET = (nn.Embedding, nn.LayerNorm, nn.RMSNorm)


def convert_to_4bit(model: ModelT, config: FourBitConfig | None = None) -> ModelT:
    """Swap the class of the model's `nn.Linear` layers, and of the experts of a mixture, to 4-bit ones, in place.

    Parameters, their identity, hooks and the keys of the state dict stay; so optimizers, DDP, FSDP2, checkpointing
    and saving work as before. One line, on the log or on stderr, says how many layers and parameters were converted
    and what was left alone; layers that transformers prepared for 4-bit training itself (FourOverSixConfig,
    FPQuantConfig) are.
    Converting again with the same configuration does nothing.

    Args:
        model: any module. Layers whose type is exactly `nn.Linear` are converted, and modules that hold the experts
            of a mixture as transformers 5 does, without what `modules_to_not_convert` names, adapters of PEFT, and
            the last blocks if `keep_last_blocks` says so. Output heads and poolers, what is tied to an embedding, what
            is not called because the model reads its weight itself (Mamba's ``dt_proj``), and the routers of mixtures
            are left alone as well, unless `target_modules` names them.
        config: formats and which layers; default `FourBitConfig()`.

    Returns:
        `model`.

    Raises:
        ValueError: no layer to convert, no list of blocks for `keep_last_blocks`, a model converted with another
            configuration, an adapter of PEFT that does not
            call the layer under it, a layer whose forward somebody has replaced, or a GPT-OSS with packed experts.
        TypeError: a weight that is not floating-point.

    Example:
        >>> model = convert_to_4bit(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)))
        >>> type(model[0]).__name__, sorted(model.state_dict())
        ('FourBitLinear', ['0.bias', '0.weight', '2.bias', '2.weight'])
    """
    config = config or FourBitConfig()
    check_experts(model)
    wanted = target_layers(model, config)
    config = with_group_size(config, wanted)
    chosen: dict[str, nn.Linear] = {}
    experts: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if type(module) is nn.Linear and name in wanted:
            check_weight(module.weight, f"{name}.weight" if name else "weight")
            check_forward(module, name)
            chosen[name] = module
        elif is_experts(module) and not isinstance(module, FourBitExperts) and name in wanted:
            check_forward(module, name)
            experts[name] = module
        elif isinstance(module, FourBitLinear | FourBitExperts) and module.four_bit != config:
            raise ValueError(
                f"layer {name!r} is already converted with another configuration; call restore_linear(model) first"
            )
    converted = any(isinstance(module, FourBitLinear | FourBitExperts) for module in model.modules())
    prepared = any(type(module).__module__.split(".")[0] in PREPARED_BY for module in model.modules())
    if not chosen and not experts and prepared and not converted:
        announce(
            logger,
            "4-bit training: the model was prepared by transformers; left alone: %s",
            ", ".join(left_alone(model)),
        )
        return model
    if not chosen and not experts and not converted:
        raise ValueError(f"no layer to convert to 4 bits: {_why_nothing(model, config)}")
    for name in chosen.keys() & directly_read(model).keys():
        logger.warning(
            "%s, named in target_modules, is a layer whose weight %s may read and multiply by itself: what it computes"
            " there is not in 4 bits; leave the layer out unless you know that it is called",
            *(name, directly_read(model)[name]),
        )
    for module in chosen.values():
        FourBitLinear.adopt(module, config)
    for block in experts.values():
        FourBitExperts.adopt(block, config)
    _share_scales(model, config)
    adopt_adapters(model)
    check_adapters(model)
    _note_in_config(model, config.to_dict())
    if unknown := _unknown_experts(model):
        logger.warning(
            "%s: the experts of this mixture are in a form that is not known here, and stay in high precision",
            ", ".join(sorted(unknown)),
        )
    if (chosen or experts) and (idle := unmatched(model, config)):
        logger.warning(
            "%s in target_modules or modules_to_not_convert: no module of the model is called so, or only one that"
            " holds layers, which target_modules and regular expressions must match themselves: it does nothing; mend"
            " the name, or leave it out",
            ", ".join(map(repr, idle)),
        )
    if chosen or experts:
        announce(
            logger,
            "4-bit training: converted %d linear layers%s (weight %s, activation %s, gradient %s): %s; left alone: %s",
            len(chosen),
            f" and {len(experts)} blocks of experts" if experts else "",
            config.weight,
            config.activation,
            config.gradient,
            in_words(model),
            ", ".join(left_alone(model)) or "none",
        )
    return model


def restore_linear(model: ModelT) -> ModelT:
    """Turn every `FourBitLinear` of `model` back into a plain `nn.Linear`, and experts into theirs; weights stay.

    Raises:
        ValueError: a layer that got another class after it was converted, as parametrizations give it; nothing is done.

    Example:
        >>> model = restore_linear(convert_to_4bit(nn.Sequential(nn.Linear(8, 8))))
        >>> type(model[0]) is nn.Linear
        True
    """
    for name, module in model.named_modules():
        if isinstance(module, FourBitLinear | FourBitExperts):
            linear = isinstance(module, FourBitLinear)
            check_class(module, FourBitLinear if linear else four_bit_class(module.original_class), name)
    release_adapters(model)
    for module in list(model.modules()):
        if isinstance(module, FourBitLinear | FourBitExperts):
            module.release()
    _note_in_config(model, None)
    own: Any = getattr(model, "config", None)
    if getattr(getattr(own, "quantization_config", None), "quant_method", None) == FourBitConfig.quant_method:
        del own.quantization_config  # of a model that came by from_pretrained(…, quantization_config=…)
    return model


# The same, named as the counterpart of `convert_to_4bit`.
convert_from_4bit = restore_linear


def configuration_of(model: nn.Module) -> FourBitConfig | None:
    """What a model was converted with; None where nothing of it is in 4 bits."""
    converted = (module for module in model.modules() if isinstance(module, FourBitLinear | FourBitExperts))
    return next((module.four_bit for module in converted), None)


def left_alone(model: nn.Module) -> list[str]:
    """What has a weight matrix and is not converted: ``name (type)``, layers of all blocks under one name."""
    found: Counter[str] = Counter()
    readers, adapters = directly_read(model), adapter_parts(model)
    for name, module in model.named_modules():
        own = any(parameter.ndim >= 2 for parameter in module.parameters(recurse=False))
        quiet = isinstance(module, (FourBitLinear, FourBitExperts, *QUIET)) or is_adapter(name, adapters)
        if own and not quiet:
            why = f", whose weight {readers[name]} reads itself" if name in readers else ""
            found[f"{re.sub(r'[.][0-9]+(?=[.]|$)', '.*', name)} ({type(module).__name__}{why})"] += 1
    return [text if count == 1 else f"{text} ×{count}" for text, count in found.items()]


def _unknown_experts(model: nn.Module) -> set[str]:
    """Classes of modules that hold matrices of experts, but not as transformers' implementations share them."""
    return {
        type(module).__name__
        for module in model.modules()
        if "expert" in type(module).__name__.lower()
        and not is_experts(module)
        and any(parameter.ndim >= 2 for parameter in module.parameters(recurse=False))
    }


def _share_scales(model: nn.Module, config: FourBitConfig) -> None:
    """Tell the siblings that an inference engine fuses about each other."""
    quantizer = config.quantizer("weight")
    if quantizer is None or quantizer.format.scale is not ScaleKind.E4M3 or config.hadamard == "all":
        return
    for parent in model.modules():
        children = dict(parent.named_children())
        for names in FUSED_SIBLINGS:
            siblings = [_base_layer(children.get(name)) for name in names]
            partners = tuple(sibling for sibling in siblings if isinstance(sibling, FourBitLinear))
            for partner in partners:
                partner.scale_partners = partners if len(partners) > 1 else ()


def _base_layer(module: Any) -> Any:
    """The layer under an adapter of PEFT."""
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def _note_in_config(model: nn.Module, note: dict | None) -> None:
    """Write the 4-bit configuration into the model's own config, or take it out."""
    own = getattr(model, "config", None)
    if own is None or not hasattr(own, "to_dict"):
        return
    if note is not None:
        setattr(own, CONFIG_KEY, note)
    elif hasattr(own, CONFIG_KEY):
        delattr(own, CONFIG_KEY)


def _why_nothing(model: nn.Module, config: FourBitConfig) -> str:
    """The rest of the message for a model without a layer to convert."""
    linears = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    heads = high_precision_layers(model).intersection(linears)
    others = [text for text in left_alone(model) if not re.search(r"\(Linear[),]", text)]
    unsupported = f"other kinds of layers are not supported: {', '.join(others)}" if others else ""
    if len(linears) == len(heads):
        what = unsupported or f"it has no {'other weight matrix' if heads else 'weight matrix at all'}"
        beside = f" but {', '.join(sorted(heads))}, which stay in high precision" if heads else ""
        return f"the model has no nn.Linear{beside}; {what}; train it without 4-bit layers"
    excluded = (
        f"nn.Linear layers: {len(linears)}, all excluded by target_modules={config.target_modules!r},"
        f" modules_to_not_convert={config.modules_to_not_convert!r} or keep_last_blocks={config.keep_last_blocks};"
        " change these so that a layer is left"
    )
    return f"{excluded}; {unsupported}" if unsupported else excluded
