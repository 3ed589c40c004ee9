"""`FourBitExperts`: fake-quantized experts of a mixture, with the parameters and names of transformers' own module.

transformers 5 keeps the experts of a layer in two parameters, ``gate_up_proj`` (experts, 2 · intermediate, hidden) and
``down_proj`` (experts, hidden, intermediate), and multiplies by them in one of several implementations (eager,
``batched_mm``, ``grouped_mm``). Each expert is a pair of matrices on a grid of its own, as `FourBitLinear`'s weight is:
``Q_w`` runs along the input dimension of each product, and the gradient goes straight through.

The module's class is swapped in place, so that parameters, their identity and the keys of the state dict stay. In the
forward pass a stand-in for the module, which has the rounded weights under the parameters' names, goes through
transformers' own implementation; nothing on the module is changed meanwhile, and PEFT's adapters on the parameters and
FSDP2 come before the rounding. What those implementations have no place for (rounded output gradients, Hadamard
transforms), and the eager loop, whose indexing makes a gradient of all experts for each expert, take the loop here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_stablespam.quant.config import FourBitConfig
from hf_stablespam.quant.layers.checks import check_class
from hf_stablespam.quant.layers.expert_weights import quantize_experts, used_experts
from hf_stablespam.quant.layers.instance_forward import rebind_forward
from hf_stablespam.quant.layers.matmul import FourBitMatmul, Recipe, StraightThrough, quantize_weight
from hf_stablespam.quant.layers.stand_in import StandIn, weight_names

# Implementations that round the numbers between the two products through the stand-in's gate.
THROUGH_THE_GATE = ("batched_mm", "grouped_mm")


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds the experts of a mixture in the form that transformers' implementations share."""
    down = getattr(module, "down_proj", None)
    return hasattr(module, "is_transposed") and hasattr(module, "has_gate") and getattr(down, "ndim", 0) == 3


class FourBitExperts(nn.Module):
    """Experts with 4-bit operands and master weights in high precision; made by `adopt`, never by itself.

    ``y = Q_w(W_down) · Q_a(gate(Q_w(W_gate_up) · Q_a(x)))`` for each token and expert. NVFP4's scale of the whole
    tensor is one for each expert's matrix, which gate and up share, and for activations one for all tokens of a call
    (with a Hadamard transform, for those of one expert).
    """

    four_bit: FourBitConfig
    recipe: Recipe
    original_class: Any
    # What transformers' decorator and classes give every such module.
    config: Any
    num_experts: int
    has_gate: bool
    has_bias: bool
    is_transposed: bool
    down_proj: Any
    act_fn: Any
    _apply_gate: Any
    post_expert_norm: Any

    @staticmethod
    def adopt(experts: nn.Module, config: FourBitConfig) -> FourBitExperts:
        """Turn a module of experts into `FourBitExperts` in place; parameters, hooks and names stay.

        Raises:
            TypeError: a weight that is not floating-point.
        """
        for name in weight_names(experts):
            if not getattr(experts, name).is_floating_point():
                raise TypeError(
                    f"{name} of {type(experts).__name__} must be floating-point to be trained in 4 bits, got "
                    f"{getattr(experts, name).dtype}; load the model in bfloat16, or name it in modules_to_not_convert"
                )
        adopted: Any = experts
        adopted.__class__ = four_bit_class(type(experts))
        rebind_forward(adopted, adopted.original_class, type(adopted))
        adopted.four_bit, adopted.recipe = config, Recipe.of(config)
        adopted._fixed = 0  # how many `fixed_weights` blocks are open
        adopted.forget_weight()
        return adopted

    def release(self) -> nn.Module:
        """Turn the module back into what it was, in place.

        Raises:
            ValueError: its class is another than the one that it was converted to.
        """
        check_class(self, four_bit_class(self.original_class))
        for name in ("four_bit", "recipe", "_fixed", "_kept"):
            del self.__dict__[name]
        rebind_forward(self, type(self), self.original_class)
        self.__class__ = self.original_class
        return self

    def forget_weight(self) -> None:
        """Drop the 4-bit weights that a `fixed_weights` block keeps; outside of one there are none."""
        self._kept: dict[tuple[str, torch.dtype], tuple[Any, Tensor]] = {}

    def quantized(self, name: str, dtype: torch.dtype | None = None, used: list[int] | None = None) -> Tensor:
        """A weight on its 4-bit grid, as the forward pass uses it, laid out as the parameter.

        Args:
            name: ``"gate_up_proj"``, ``"up_proj"`` or ``"down_proj"``.
            dtype: dtype of the product; default: that of the weight.
            used: see `quantize_experts`.
        """
        with torch.inference_mode(False), torch.no_grad():
            weight = getattr(self, name)
            return quantize_experts(weight, self.recipe, dtype or weight.dtype, bool(self.is_transposed), used)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Apply each token's experts.

        Args:
            hidden_states: (tokens, hidden).
            top_k_index: (tokens, experts of a token), which they are.
            top_k_weights: the same shape, the weight of each.
        """
        device, dtype = hidden_states.device.type, self.down_proj.dtype
        if torch.is_autocast_enabled(device) and hidden_states.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):  # the quantizers' arithmetic is not to be cast
            y = self._experts(hidden_states.to(dtype), top_k_index, top_k_weights, dtype)
        return y.to(hidden_states.dtype)

    def _experts(self, x: Tensor, index: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
        implementation = self.config._experts_implementation
        recipe = self.recipe
        if implementation in (None, "eager") or recipe.gradient is not None or recipe.hadamard is not None:
            return _loop(self, x, index, weights, dtype)
        if recipe.activation is not None and implementation not in THROUGH_THE_GATE:
            raise ValueError(
                f"experts_implementation must be 'eager', 'batched_mm' or 'grouped_mm' for 4-bit activations, got "
                f"{implementation!r}, which rounds nothing between the products; set one of these, or activation=None"
            )
        # Another implementation than transformers' may read all experts.
        used = used_experts(index, self.num_experts) if implementation in THROUGH_THE_GATE else None
        stand_in = StandIn(self, dtype, used)
        with stand_in.rounded_again_in_backward():
            return self.original_class.forward(stand_in, StraightThrough.apply(x, recipe.activation), index, weights)

    def _saves_weights(self) -> bool:
        """Whether 4-bit weights are saved for the backward pass, rather than made there again (FSDP2 frees its own)."""
        return self.four_bit.cache_weights and not hasattr(self, "unshard")

    def _weight(self, name: str, dtype: torch.dtype, used: list[int] | None) -> Tensor:
        """`quantized`; while a `fixed_weights` block is open all experts, kept."""
        source = getattr(self, name)
        if not self._fixed or source.is_inference():
            return self.quantized(name, dtype, used)
        key = (source, source._version, source.data_ptr())
        kept = self._kept.get((name, dtype))
        if kept is None or kept[0][0] is not source or kept[0][1:] != key[1:]:
            kept = self._kept[name, dtype] = (key, self.quantized(name, dtype))
        return kept[1]

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = {**self.__dict__, "_kept": {}, "_fixed": 0}
        return _rebuild, (self.original_class,), state

    def extra_repr(self) -> str:
        config = self.four_bit
        return f"weight={config.weight}, activation={config.activation}, gradient={config.gradient}"


def _loop(experts: FourBitExperts, x: Tensor, index: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """The experts' products one expert at a time, those without a token left out."""
    recipe = experts.recipe
    if recipe.hadamard is None:
        # One scale for the whole call, as through the stand-in; a transform has to come before the rounding.
        x, products = StraightThrough.apply(x, recipe.activation), recipe._replace(activation=None)
    else:
        products = recipe
    chosen = index.reshape(-1)
    sorted_ids, order = chosen.sort(stable=True)
    # Past the last expert there are places of experts that live on other devices.
    counts = torch.bincount(sorted_ids.clamp(max=experts.num_experts), minlength=experts.num_experts + 1).tolist()[:-1]
    order = order[: sum(counts)]
    first, second = weight_names(experts)
    up = _products(experts, first, x[order // index.shape[-1]], counts, products, dtype)
    gated = experts._apply_gate(up) if experts.has_gate else experts.act_fn(up)
    if recipe.hadamard is None:
        gated = StraightThrough.apply(gated, recipe.activation)
    down = _products(experts, second, gated, counts, products, dtype)
    if getattr(experts, "has_post_expert_norm", False):
        down = experts.post_expert_norm(down)
    weighted = down * weights.reshape(-1)[order, None]
    places = torch.zeros(len(chosen), weighted.shape[-1], dtype=weighted.dtype, device=x.device)
    return places.index_copy(0, order, weighted).view(*index.shape, -1).sum(1)


def _products(
    experts: FourBitExperts, name: str, x: Tensor, counts: list[int], recipe: Recipe, dtype: torch.dtype
) -> Tensor:
    """``Q(W_e) · x`` for the rows of each expert e; rows are sorted by expert."""
    master = getattr(experts, name)
    # Not by index: each would make a gradient of the size of all experts.
    matrices = (master.transpose(1, 2) if experts.is_transposed else master).unbind(0)
    biases = getattr(experts, f"{name}_bias").to(dtype).unbind(0) if experts.has_bias else [None] * len(matrices)
    parts = []
    for matrix, bias, rows in zip(matrices, biases, x.split(counts), strict=True):
        if len(rows):
            rounded = quantize_weight(matrix, recipe, dtype) if experts._saves_weights() else None
            parts.append(FourBitMatmul.apply(rows, matrix, bias, rounded, None, recipe))
    return torch.cat(parts) if parts else x.new_zeros(0, matrices[0].shape[0])


_four_bit_classes: dict[Any, Any] = {}


def four_bit_class(original: Any) -> Any:
    """The class that takes the place of `original`: one for each, so that instances have equal types."""
    if original not in _four_bit_classes:
        made = type(f"FourBit{original.__name__}", (FourBitExperts, original), {"original_class": original})
        _four_bit_classes[original] = made
    return _four_bit_classes[original]


def _rebuild(original: type[nn.Module]) -> nn.Module:
    """An empty `FourBitExperts` of a class, for pickle and copies: the class made here has no importable name."""
    made = four_bit_class(original)
    return made.__new__(made)
