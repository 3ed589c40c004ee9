"""The decoder layers of a model that can be pruned: found by the names of their projections, not by class."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hf_stablespam import FourBitLinear
from hf_stablespam._sharded import is_sharded

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class DecoderLayer:
    """A decoder layer of Llama's shape.

    Args:
        name: its name in the model.
        module: itself.
        head_dim: channels of a head.
        queries: query heads that share a key-value head: head ``i`` belongs to key-value head ``i // queries``.
    """

    name: str
    module: Any
    head_dim: int
    queries: int

    @property
    def neurons(self) -> int:
        """MLP neurons."""
        return self.linear("gate_proj").weight.shape[0]

    @property
    def kv_heads(self) -> int:
        """Key-value heads."""
        return self.linear("k_proj").weight.shape[0] // self.head_dim

    def path(self, name: str) -> str:
        """The full name of the projection of this name."""
        return f"{self.name}.{'self_attn' if name in ATTENTION else 'mlp'}.{name}"

    def linear(self, name: str) -> nn.Linear:
        """The projection of this name."""
        return getattr(self.module.self_attn if name in ATTENTION else self.module.mlp, name)

    def cuts(self, kind: str) -> Iterator[tuple[str, str, int, int]]:
        """Where the units of a kind live: module, parameter, dimension, and channels per unit there.

        Args:
            kind: ``"neurons"`` or ``"kv_heads"``.
        """
        head = self.head_dim
        widths = {
            "neurons": (("gate_proj", 0, 1), ("up_proj", 0, 1), ("down_proj", 1, 1)),
            "kv_heads": (
                *(("q_proj", 0, self.queries * head), ("k_proj", 0, head)),
                *(("v_proj", 0, head), ("o_proj", 1, self.queries * head)),
            ),
        }
        for module, dim, width in widths[kind]:
            yield module, "weight", dim, width
            if dim == 0 and self.linear(module).bias is not None:
                yield module, "bias", 0, width

    def tensors(self, kind: str) -> list[tuple[Tensor, int, int]]:
        """Parameter, dimension and channels per unit of a kind, tied ones once."""
        found = {}
        for module, parameter, dim, width in self.cuts(kind):
            tensor = getattr(self.linear(module), parameter)
            found[id(tensor)] = (tensor, dim, width)
        return list(found.values())

    def unit_parameters(self, kind: str) -> int:
        """Parameters that one unit of a kind owns."""
        return sum(tensor.numel() // tensor.shape[dim] * width for tensor, dim, width in self.tensors(kind))

    def key(self) -> tuple[int, ...]:
        """Equal for layers that share their parameters."""
        return tuple(id(self.linear(name).weight) for name in (*ATTENTION, *MLP))


def count_parameters(model: nn.Module) -> int:
    """All parameters of a model, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def find_layers(model: nn.Module) -> list[DecoderLayer]:
    """The decoder layers of Llama's shape, in the order of the model.

    Raises:
        TypeError: there are none, or one among them has experts or parameters that no rule here knows how to cut;
            the message names the class.
        ValueError: the model is wrapped or sharded.
    """
    refuse_wrapped(model)
    found = {name: module for name, module in model.named_modules() if _has_shape(module)}
    for name, blocks in model.named_modules():
        if isinstance(blocks, nn.ModuleList) and any(_has_shape(block) for block in blocks):
            for index, block in enumerate(blocks):
                if not _has_shape(block):
                    raise TypeError(f"layer {name}.{index} cannot be pruned: {_why_not(block)}")
    if not found:
        blocks = [child for child in model.modules() if isinstance(child, nn.ModuleList) and len(child)]
        what = _why_not(blocks[0][0]) if blocks else "it has no list of layers"
        raise TypeError(
            f"{type(model).__name__} has no decoder layers with self_attn.{{q,k,v,o}}_proj and"
            f" mlp.{{gate,up,down}}_proj: {what}; Llama, Qwen, Mistral, Gemma and SmolLM have them"
        )
    return [_decoder_layer(name, module) for name, module in found.items()]


def check_trainable(model: nn.Module, layers: list[DecoderLayer]) -> None:
    """Raise unless the units of all layers are plain trainable weights.

    Raises:
        ValueError: an adapter of PEFT, a quantized weight, a frozen weight, or weights in float16.
    """
    if hasattr(model, "peft_config"):
        raise ValueError("the model is wrapped by PEFT; merge the adapter first: model = model.merge_and_unload()")
    for layer in layers:
        for name in (*ATTENTION, *MLP):
            linear, full = layer.linear(name), layer.path(name)
            if hasattr(linear, "base_layer"):
                raise ValueError(f"{full} holds an adapter; merge the adapter first: model.merge_and_unload()")
            if type(linear) not in (nn.Linear, FourBitLinear) or not linear.weight.is_floating_point():
                raise ValueError(
                    f"{full} must be an nn.Linear with a floating-point weight, got {type(linear).__name__} of"
                    f" {linear.weight.dtype}: it is quantized already; prune before quantizing"
                )
            if linear.weight.dtype == torch.float16:
                raise ValueError(f"{full} is in float16, whose gradients underflow; load with dtype=torch.bfloat16")
            for parameter in linear.parameters():
                if not parameter.requires_grad:
                    raise ValueError(
                        f"{full} is frozen (requires_grad=False) and has no gradient to be scored by; call"
                        " model.requires_grad_(True), or name the layer in keep_layers"
                    )


def refuse_wrapped(model: nn.Module) -> None:
    """Raise for what would not notice that a parameter was replaced.

    Raises:
        ValueError: DDP, FSDP, DeepSpeed ZeRO-3, or a compiled model.
    """
    if isinstance(model, DistributedDataParallel):
        raise ValueError(
            "the model is wrapped in DistributedDataParallel, which would not synchronise the new parameters; prune"
            " model.module before wrapping, or use prune_and_train, which makes a Trainer per stage"
        )
    if hasattr(model, "_orig_mod"):
        raise ValueError("the model is compiled for its present widths; prune it before torch.compile")
    for name, parameter in model.named_parameters():
        if is_sharded(parameter) or name.endswith("_flat_param"):
            raise ValueError("the model is sharded by FSDP, which holds no whole units; prune it before sharding")
        if hasattr(parameter, "ds_id"):
            raise ValueError("DeepSpeed ZeRO-3 has partitioned the model and holds no whole units; prune it before")


def refuse_hooks(layers: list[DecoderLayer]) -> None:
    """Raise if something hangs on a parameter that would not notice its replacement.

    Raises:
        ValueError: gradient hooks, as those of optimizers that step inside of the backward pass.
    """
    for layer in layers:
        for name in (*ATTENTION, *MLP):
            for parameter in layer.linear(name).parameters():
                if getattr(parameter, "_post_accumulate_grad_hooks", None) or parameter._backward_hooks:
                    raise ValueError(
                        f"{layer.path(name)} has gradient hooks, as layer-wise optimizers put on it, and its successor"
                        " would never be updated; use an optimizer that steps after the backward pass, or remove the"
                        " hooks before pruning"
                    )


def shared_groups(layers: list[DecoderLayer]) -> list[list[int]]:
    """Indices of layers that share their parameters, together; in the order of the first of each.

    Raises:
        ValueError: two layers share a part of their parameters.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, layer in enumerate(layers):
        groups.setdefault(layer.key(), []).append(index)
    owners: dict[int, tuple[int, ...]] = {}
    for key in groups:
        for tensor in key:
            if owners.setdefault(tensor, key) != key:
                first, second = groups[owners[tensor]][0], groups[key][0]
                raise ValueError(
                    f"layers {first} and {second} share a part of their weights, which cannot be cut for one alone;"
                    " untie them, or name both in keep_layers"
                )
    return list(groups.values())


def _has_shape(module: nn.Module) -> bool:
    attention, mlp = getattr(module, "self_attn", None), getattr(module, "mlp", None)
    return all(hasattr(attention, name) for name in ATTENTION) and all(hasattr(mlp, name) for name in MLP)


def _why_not(block: nn.Module) -> str:
    mlp = getattr(block, "mlp", None)
    if mlp is not None and (hasattr(mlp, "experts") or hasattr(mlp, "shared_expert")):
        return f"{type(mlp).__name__} of {type(block).__name__} has experts, for which there is no rule here"
    return f"found {type(block).__name__}"


def _decoder_layer(name: str, module: Any) -> DecoderLayer:
    attention, mlp = module.self_attn, module.mlp
    rows = {part: _rows(getattr(attention, part)) for part in ATTENTION}
    config = getattr(attention, "config", None)
    head_dim = getattr(attention, "head_dim", None) or getattr(config, "head_dim", None)
    kind = type(attention).__name__
    if not head_dim or rows["k_proj"] % head_dim or rows["q_proj"] % rows["k_proj"]:
        raise TypeError(f"{name}.self_attn ({kind}) has no whole heads in q_proj and k_proj: {rows}; not supported")
    if _columns(attention.o_proj) != rows["q_proj"]:
        raise TypeError(
            f"{name}.self_attn ({kind}) has {_columns(attention.o_proj)} inputs in o_proj and {rows['q_proj']} rows in"
            " q_proj, which must be equal; gated attention is not supported"
        )
    for part, own in ((attention, ATTENTION), (mlp, MLP)):
        for path, parameter in part.named_parameters():
            known = path.split(".")[0] in own
            # A norm that all heads share (q_norm.weight). Deeper ones are of one head each, bare vectors of none.
            shared = part is attention and tuple(parameter.shape) == (head_dim,) and path.count(".") == 1
            if not known and not shared:
                raise TypeError(
                    f"{type(part).__name__} has a parameter {path} of shape {tuple(parameter.shape)}, of which it is"
                    " not known which part belongs to which unit; not supported"
                )
    return DecoderLayer(name, module, head_dim, rows["q_proj"] // rows["k_proj"])


def _rows(linear: Any) -> int:
    return getattr(linear, "out_features", None) or getattr(linear, "base_layer", linear).weight.shape[0]


def _columns(linear: Any) -> int:
    return getattr(linear, "in_features", None) or getattr(linear, "base_layer", linear).weight.shape[-1]
