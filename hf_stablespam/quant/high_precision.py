"""Which linear layers stay in high precision by themselves: heads, what is tied or not called, routers."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from hf_stablespam.quant.direct_reads import directly_read

# Heads and poolers by the names that transformers gives them, for models that do not say what their base is.
HEADS = frozenset({"lm_head", "cls", "classifier", "score", "qa_outputs", "pooler"})
ROUTERS = frozenset({"router", "shared_expert_gate"})


def high_precision_layers(model: nn.Module) -> set[str]:
    """Names of the modules of `model` that are not 4-bit unless `target_modules` names them.

    These are output heads (what `get_output_embeddings` returns, what a transformers model holds beside its base,
    and the usual names of heads and poolers), linear layers whose weight is an embedding's, those whose weight the
    model multiplies by itself instead of calling them, the routers and gates of mixtures of experts, and what shares
    its weight with one of these.
    """
    modules = dict(model.named_modules())
    apart = {id(module) for owner in modules.values() for module in _heads(owner)}
    embedded = {id(module.weight) for module in modules.values() if isinstance(module, nn.Embedding)}
    found = set(directly_read(model))
    for name, module in modules.items():
        parts = name.split(".")
        tied = isinstance(module, nn.Linear) and id(module.weight) in embedded
        if tied or id(module) in apart or not HEADS.isdisjoint(parts) or _is_router(parts, modules):
            found.add(name)
    kept = {id(modules[name].weight) for name in found if isinstance(modules[name], nn.Linear)}
    return found | {
        name for name, module in modules.items() if isinstance(module, nn.Linear) and id(module.weight) in kept
    }


def _heads(owner: nn.Module) -> Iterator[nn.Module]:
    """The modules of a transformers model that compute its outputs from what its base computes."""
    prefix = getattr(type(owner), "base_model_prefix", "")
    if not prefix:
        return
    output = _output_embeddings(owner)
    if output is not None:
        yield from output.modules()
    base = owner._modules.get(prefix)
    if base is None:
        return
    for child in owner.children():
        below = list(child.modules())
        # A part that is a model of its own (a vision tower beside the language model) is no head.
        if not any(module is base or hasattr(type(module), "base_model_prefix") for module in below):
            yield from below


def _output_embeddings(owner: nn.Module) -> nn.Module | None:
    try:
        output = owner.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):  # not every model knows
        return None
    return output if isinstance(output, nn.Module) else None


def _is_router(parts: list[str], modules: dict[str, nn.Module]) -> bool:
    """Whether a module, or one that it is in, chooses experts: called so, or a ``gate`` beside ``experts``."""
    if not ROUTERS.isdisjoint(parts):
        return True
    places = (index for index, part in enumerate(parts) if part == "gate")
    return any(".".join([*parts[:index], "experts"]) in modules for index in places)
