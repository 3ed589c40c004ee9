"""Cutting units out of a model: new parameters in the place of the old, in the model and in its optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_stablespam import FourBitLinear
from hf_stablespam.quant.export.widths import note_counts
from hf_stablespam.recipes.adapt_pruner.model.layers import DecoderLayer, count_parameters, find_layers, refuse_hooks
from hf_stablespam.recipes.adapt_pruner.model.optimizer_state import RESET, OptimizerSurgeon
from hf_stablespam.recipes.adapt_pruner.model.widths import note_widths
from hf_stablespam.recipes.adapt_pruner.plan import LayerPlan, PruningPlan, PruningReport


def prune_units(
    model: nn.Module, plan: PruningPlan, optimizer: Any = None, *, optimizer_state: str = RESET
) -> PruningReport:
    """Cut every unit that the plan does not keep out of the model, in place.

    Kept units stay in their order with their weights; what had to become smaller is a new ``nn.Parameter`` in the place
    of the old one, in the model and in the optimizer's ``param_groups``. Layers that share parameters share the new
    ones. A model with all layers alike gets their width into its config, one with unequal layers a note of all widths
    (see `save_pruned`), and so one whose class takes the width of a head from the number of heads (StableLM, Helium).

    Args:
        model: a causal language model of Llama's shape.
        plan: what to keep of each layer.
        optimizer: that trains it, wrapped by accelerate or not. Default `None`.
        optimizer_state: ``"reset"``: cut parameters begin with a fresh state and the moments of all are reset;
            ``"keep"``: states of the parameter's shape are indexed like it, and AdaGN's history of the norm is scaled
            by the share that is left. 8- and 4-bit moments and GaLore's projections cannot be indexed: those
            parameters are reset and named in the report.

    Returns:
        What was done; ``kept`` names the indices of every layer.

    Raises:
        ValueError: a plan that does not fit the model, an adapter, a wrapped, sharded or compiled model; before
            anything is changed.
        TypeError: a model without such layers.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> shape = dict(vocab_size=8, hidden_size=8, intermediate_size=6, num_attention_heads=2, num_hidden_layers=1)
        >>> model = LlamaForCausalLM(LlamaConfig(**shape))
        >>> prune_units(model, PruningPlan([{"neurons": [0, 2, 5], "kv_heads": [1]}])).widths
        [{'intermediate_size': 3, 'kv_heads': 1}]
    """
    layers = find_layers(model)
    whole = checked(plan, layers)
    refuse_adapters(model, layers)
    refuse_hooks(layers)
    surgeon = OptimizerSurgeon(optimizer, optimizer_state)
    before = count_parameters(model)
    changed = cut_layers(layers, whole, surgeon)
    if changed:
        note_widths(model, layers)
        surgeon.finish()
    return PruningReport(before, count_parameters(model), None, whole, reset=names_of(model, surgeon.dropped))


def refuse_adapters(model: nn.Module, layers: Sequence[DecoderLayer]) -> None:
    """Raise if there is an adapter, which would keep the old width."""
    if hasattr(model, "peft_config") or any(
        hasattr(layer.linear(name), "base_layer") for layer in layers for name in ("q_proj", "gate_proj", "down_proj")
    ):
        raise ValueError("the model holds an adapter; merge the adapter first: model = model.merge_and_unload()")


def checked(plan: PruningPlan, layers: Sequence[DecoderLayer]) -> PruningPlan:
    """The plan with every `None` written out.

    Raises:
        ValueError: it does not fit the layers.
    """
    if len(plan.layers) != len(layers):
        raise ValueError(f"plan must have one entry per layer, got {len(plan.layers)} for {len(layers)} layers")
    whole = []
    for layer, wanted in zip(layers, plan.layers, strict=True):
        both = {}
        for kind in ("neurons", "kv_heads"):
            present, kept = getattr(layer, kind), getattr(wanted, kind)
            both[kind] = tuple(range(present)) if kept is None else kept
            if not both[kind] or list(both[kind]) != sorted(set(both[kind])):
                raise ValueError(f"{kind} of {layer.name} must be ascending indices, at least one, got {list(kept)}")
            if both[kind][0] < 0 or both[kind][-1] >= present:
                raise ValueError(f"{kind} of {layer.name} must be below the {present} that it has, got {list(kept)}")
        whole.append(LayerPlan(**both))
    return PruningPlan(whole)


def cut_layers(layers: Sequence[DecoderLayer], plan: PruningPlan, surgeon: OptimizerSurgeon) -> bool:
    """Carry out a plan that has been checked; whether there was anything to cut."""
    replaced: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # the old one is held, so that its id stays taken
    changed = False
    for layer, wanted in zip(layers, plan.layers, strict=True):
        for kind in ("neurons", "kv_heads"):
            kept = getattr(wanted, kind)
            if len(kept) == getattr(layer, kind) and not _already(layer, kind, replaced):
                continue
            changed = True
            cut_kind(layer, kind, kept, replaced, surgeon)
    return changed


def cut_kind(
    layer: DecoderLayer,
    kind: str,
    kept: Sequence[int],
    replaced: dict[int, tuple[nn.Parameter, nn.Parameter]],
    surgeon: OptimizerSurgeon,
) -> None:
    """Keep these units of a kind in one layer.

    Args:
        layer: where.
        kind: ``"neurons"`` or ``"kv_heads"``.
        kept: their indices, ascending.
        replaced: id of every parameter that has been cut before → it and its successor, for tied ones.
        surgeon: of the optimizer.
    """
    for module, parameter, dim, width in list(layer.cuts(kind)):
        linear = layer.linear(module)
        old = getattr(linear, parameter)
        if id(old) not in replaced:
            index = channels_of(kept, width).to(old.device)
            new = nn.Parameter(old.detach().index_select(dim, index), requires_grad=old.requires_grad)
            surgeon.replace(old, new, lambda tensor, dim=dim, index=index: tensor.index_select(dim, index))  # type: ignore[misc]
            replaced[id(old)] = (old, new)
        setattr(linear, parameter, replaced[id(old)][1])
        linear.out_features, linear.in_features = linear.weight.shape
        if isinstance(linear, FourBitLinear):
            partners = linear.scale_partners
            linear.configure(linear.four_bit)  # it knows its weight by its id, and keeps it in 4 bits
            linear.scale_partners = partners
    if kind == "neurons":
        note_counts(layer.module.mlp, intermediate_size=len(kept))
    else:
        heads = len(kept) * layer.queries
        note_counts(layer.module.self_attn, num_key_value_heads=len(kept), num_heads=heads, num_attention_heads=heads)


def channels_of(units: Sequence[int], width: int) -> Tensor:
    """Indices of the channels of some units of `width` channels each."""
    first = torch.as_tensor(list(units), dtype=torch.int64) * width
    return (first.unsqueeze(1) + torch.arange(width)).reshape(-1)


def names_of(model: nn.Module, parameters: Sequence[Tensor]) -> tuple[str, ...]:
    """Names of some of the model's parameters."""
    wanted = {id(parameter) for parameter in parameters}
    return tuple(name for name, parameter in model.named_parameters() if id(parameter) in wanted)


def _already(layer: DecoderLayer, kind: str, replaced: dict[int, Any]) -> bool:
    return any(id(getattr(layer.linear(module), parameter)) in replaced for module, parameter, _, _ in layer.cuts(kind))
