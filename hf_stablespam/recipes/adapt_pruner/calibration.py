"""Gradients and hidden states on calibration batches, with the model left as it was found."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_stablespam._evaluating import evaluating
from hf_stablespam.recipes.adapt_pruner.model.layers import ATTENTION, MLP, DecoderLayer


class LayerProbe:
    """Measures ``−mean cos(h_in, h_out)`` of every decoder layer, batch by batch, by hooks on the layers.

    Args:
        layers: from `find_layers`.
    """

    def __init__(self, layers: list[DecoderLayer]) -> None:
        self.layers = layers
        self.sums: list[Tensor] = []  # one vector (layers,) per batch
        self.mask: Tensor | None = None  # (batch, tokens), 1 for a real token
        self._seen: dict[int, list[Tensor]] = {}

    @contextmanager
    def watching(self) -> Iterator[LayerProbe]:
        """Hooks on the layers for as long as the context lasts."""
        hooks = [
            layer.module.register_forward_hook(self._keeping(index), with_kwargs=True)
            for index, layer in enumerate(self.layers)
        ]
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    def next_batch(self) -> None:
        """What the layers saw becomes one row of the sums; a layer that ran twice gets its mean."""
        rows = [torch.stack(self._seen[index]).mean() for index in range(len(self.layers))]
        self.sums.append(torch.stack([row.to(rows[0].device) for row in rows]))
        self._seen = {}

    def importance(self) -> Tensor:
        """``I_l`` (layers,), summed over the batches, on the CPU in float64."""
        return torch.stack(self.sums).sum(0).double().cpu()

    def _keeping(self, index: int) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            # A tensor in transformers 5, a tuple before: never the first sample of the tensor.
            after = output if isinstance(output, Tensor) else output[0]
            self._seen.setdefault(index, []).append(-mean_cosine(before.detach(), after.detach(), self.mask))

        return hook


def mean_cosine(before: Tensor, after: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the tokens of the cosine between two states.

    Args:
        before, after: (batch, tokens, channels).
        mask: (batch, tokens), 0 for padding; `None` counts all.
    """
    dtype = torch.promote_types(before.dtype, torch.float32)
    cosine = nn.functional.cosine_similarity(before.to(dtype), after.to(dtype), dim=-1)
    if mask is None:
        return cosine.mean()
    mask = mask.to(cosine.device, cosine.dtype)
    return (cosine * mask).sum() / mask.sum().clamp(min=1)


@contextmanager
def seeded_evaluation(model: nn.Module, seed: int) -> Iterator[None]:
    """Dropout off and random numbers from `seed`; modes and generators come back at the end."""
    states = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices), evaluating(model):
            for seeded in (random.seed, np.random.seed, torch.manual_seed):
                seeded(seed % 2**32)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def calibrate(
    model: nn.Module,
    layers: list[DecoderLayer],
    scored: list[DecoderLayer],
    batches: Iterable[Mapping[str, Any]],
    seed: int,
) -> tuple[Tensor, float]:
    """Sum the gradients of the mean loss over the batches into ``.grad`` of the units' weights.

    Args:
        model: any causal language model of transformers.
        layers: all its layers, whose importance is measured.
        scored: those whose projections get a gradient; nothing else gets one.
        batches: with ``input_ids`` and, if wanted, ``attention_mask`` and ``labels``.
        seed: of whatever the batches draw.

    Returns:
        ``I_l`` (layers,) and the mean loss.

    Raises:
        ValueError: no batch, or a loss that is not finite.
    """
    linears = [layer.linear(name) for layer in scored for name in (*ATTENTION, *MLP)]
    wanted = {id(tensor) for linear in linears for tensor in linear.parameters()}
    others = [tensor for tensor in model.parameters() if tensor.requires_grad and id(tensor) not in wanted]
    model.zero_grad(set_to_none=True)
    probe, losses = LayerProbe(layers), []
    for tensor in others:  # their gradients cost a third of the time of a small model and nobody reads them
        tensor.requires_grad_(False)
    try:
        with seeded_evaluation(model, seed), torch.enable_grad(), probe.watching():
            for batch in batches:
                inputs = prepared(model, batch)
                probe.mask = inputs.get("attention_mask")
                loss = _loss(model, inputs)
                loss.backward()
                probe.next_batch()
                losses.append(loss.detach())
    finally:
        for tensor in others:
            tensor.requires_grad_(True)
    if not losses:
        raise ValueError("calibration must yield at least one batch, got none; pass a list of batches or a DataLoader")
    total = torch.stack(losses)
    if not torch.isfinite(total).all():
        bad = [index for index, value in enumerate(total.tolist()) if not np.isfinite(value)]
        raise ValueError(
            f"the loss of the calibration must be finite, got {total[bad[0]].item()} in batch {bad[0]}; look for"
            " batches without a label, or for weights that have diverged"
        )
    return probe.importance(), float(total.mean())


def prepared(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a batch that the model's forward takes, on its device, with labels.

    Raises:
        TypeError: the batch is no mapping.
        ValueError: it has no ``input_ids``.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(f"a calibration batch must be a dictionary with input_ids, got {type(batch).__name__}")
    if "input_ids" not in batch:
        raise ValueError(f"a calibration batch must have input_ids, got the keys {sorted(batch)}")
    known = inspect.signature(model.forward).parameters
    device = next(model.parameters()).device
    inputs: dict[str, Any] = {}
    for name, value in batch.items():
        if name in known and value is not None:
            tensor = torch.as_tensor(value).to(device)
            inputs[name] = tensor.unsqueeze(0) if tensor.ndim == 1 else tensor  # a row of a data set
    if inputs.get("labels") is None:
        mask = inputs.get("attention_mask")
        labels = inputs["input_ids"]
        inputs["labels"] = labels if mask is None else labels.masked_fill(mask == 0, -100)
    if "use_cache" in known:
        inputs["use_cache"] = False
    return inputs


def reiterable(calibration: Any) -> Iterable[Mapping[str, Any]]:
    """`calibration` if it can be gone through again, else all its batches as a list."""
    if isinstance(calibration, Mapping):
        raise TypeError("calibration must be a list of batches, got one dictionary; write [batch]")
    return list(calibration) if iter(calibration) is calibration else calibration


def _loss(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    loss = model(**inputs).loss
    if loss is None:
        raise TypeError(f"{type(model).__name__} returns no loss for labels; prune a model with a language-model head")
    return loss
