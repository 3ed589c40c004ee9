"""How much a layer changes the hidden state, and how much the loss would miss a unit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_stablespam.recipes.adapt_pruner.calibration import LayerProbe, prepared, reiterable, seeded_evaluation
from hf_stablespam.recipes.adapt_pruner.model.layers import DecoderLayer, find_layers, shared_groups


@dataclass(frozen=True)
class LayerScores:
    """What removing each unit of a layer would cost, to first order.

    Args:
        neurons: one score per MLP neuron.
        kv_heads: one score per key-value head and its query heads.
    """

    neurons: Tensor
    kv_heads: Tensor


def layer_importance(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], metric: str = "cosine", *, seed: int = 0
) -> Tensor:
    """How much each decoder layer changes the hidden state: ``I_l = Σ_batches −mean_tokens cos(h_in, h_out)``.

    Layers with a small ``I_l`` change little. In evaluation mode and without gradients; padding does not count; the
    model is left as it was.

    Args:
        model: a causal language model of Llama's shape.
        batches: calibration batches with ``input_ids`` and, if wanted, ``attention_mask``.
        metric: ``"cosine"``, the only one there is.
        seed: of whatever the batches draw. Default 0.

    Returns:
        (layers,) float64, on the CPU.

    Raises:
        ValueError: another metric, or no batch.
        TypeError: a model without such layers.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> shape = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=3)
        >>> layer_importance(LlamaForCausalLM(LlamaConfig(**shape)), [{"input_ids": torch.tensor([[1, 2, 3]])}]).shape
        torch.Size([3])
    """
    if metric != "cosine":
        raise ValueError(f"metric must be 'cosine', got {metric!r}")
    probe = LayerProbe(find_layers(model))
    with seeded_evaluation(model, seed), torch.no_grad(), probe.watching():
        for batch in reiterable(batches):
            inputs = prepared(model, batch)
            inputs.pop("labels", None)
            probe.mask = inputs.get("attention_mask")
            model(**inputs)
            probe.next_batch()
    if not probe.sums:
        raise ValueError("batches must have at least one batch, got none")
    return shared_mean(probe.importance(), probe.layers)


def group_importance(model: nn.Module) -> list[LayerScores]:
    """The Taylor score of every unit, from the gradients that are there: ``g = Σ |w · ∂L/∂w|`` over all it owns.

    A neuron owns its row of ``gate_proj`` and ``up_proj`` and its column of ``down_proj``; a key-value head its rows
    of ``k_proj`` and ``v_proj``, and the rows of ``q_proj`` and columns of ``o_proj`` of its own query heads. (The
    official code adds those of other query heads where several share a key-value head.) Biases go with their rows.

    Args:
        model: a causal language model of Llama's shape, after a backward pass.

    Returns:
        One `LayerScores` per decoder layer, in float32 at least.

    Raises:
        ValueError: a weight without a gradient.
        TypeError: a model without such layers.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> shape = dict(vocab_size=8, hidden_size=8, intermediate_size=6, num_attention_heads=2, num_hidden_layers=1)
        >>> model, ids = LlamaForCausalLM(LlamaConfig(**shape)), torch.tensor([[1, 2, 3]])
        >>> model(input_ids=ids, labels=ids).loss.backward()
        >>> scores = group_importance(model)[0]
        >>> scores.neurons.shape, scores.kv_heads.shape
        (torch.Size([6]), torch.Size([2]))
    """
    return scores_of(find_layers(model))


def scores_of(layers: Iterable[DecoderLayer]) -> list[LayerScores]:
    """`group_importance` of layers that have been found."""
    return [LayerScores(_scores(layer, "neurons"), _scores(layer, "kv_heads")) for layer in layers]


def shared_mean(importance: Tensor, layers: list[DecoderLayer]) -> Tensor:
    """The importance of layers that share their parameters is their mean, so that they are cut alike."""
    mean = importance.clone()
    for group in shared_groups(layers):
        mean[group] = importance[group].mean()
    return mean


@torch.no_grad()
def _scores(layer: DecoderLayer, kind: str) -> Tensor:
    total: Any = 0
    for tensor, dim, width in layer.tensors(kind):
        if tensor.grad is None:
            raise ValueError(
                f"{layer.name} has a weight of shape {tuple(tensor.shape)} without a gradient, which the score needs;"
                " call loss.backward() first, on a model whose weights require gradients"
            )
        dtype = torch.promote_types(tensor.dtype, torch.float32)
        saliency = (tensor.to(dtype) * tensor.grad.to(dtype)).abs()  # of the shape of the parameter
        channels = saliency.sum(1 - dim) if saliency.ndim == 2 else saliency
        total = total + channels.view(-1, width).sum(1)
    return total
