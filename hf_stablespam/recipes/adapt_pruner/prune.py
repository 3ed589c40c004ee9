"""`adapt_prune`: measure, choose, cut, again and again, until the model is as small as it was to be."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers.utils import logging as progress

from hf_stablespam.recipes.adapt_pruner.calibration import calibrate, reiterable
from hf_stablespam.recipes.adapt_pruner.importance import scores_of, shared_mean
from hf_stablespam.recipes.adapt_pruner.model.layers import (
    DecoderLayer,
    check_trainable,
    count_parameters,
    find_layers,
    refuse_hooks,
    shared_groups,
)
from hf_stablespam.recipes.adapt_pruner.model.optimizer_state import RESET, OptimizerSurgeon
from hf_stablespam.recipes.adapt_pruner.model.surgery import cut_layers, names_of
from hf_stablespam.recipes.adapt_pruner.model.widths import note_widths
from hf_stablespam.recipes.adapt_pruner.options import Options, absolute_target, check_target, kept_layers, supplies
from hf_stablespam.recipes.adapt_pruner.plan import LayerPlan, PruningPlan, PruningReport, PruningStep
from hf_stablespam.recipes.adapt_pruner.selection import adaptive_sparsity, bundles, lowest, to_remove, trimmed

logger = logging.getLogger(__name__)


def adapt_prune(
    model: nn.Module,
    target_parameters: int | float,
    calibration: Iterable[Mapping[str, Any]],
    *,
    steps: int = 50,
    amplitude: float = 0.02,
    ratio: float = 1.0,
    multiple_of: int | None = None,
    prune_attention: bool = True,
    keep_layers: Sequence[int] = (),
    seed: int = 0,
    equal_widths: bool = False,
    optimizer: Any = None,
    optimizer_state: str = RESET,
    show_progress: bool = True,
) -> PruningReport:
    """Make a model smaller, a few per cent of its neurons and heads at a time (Adapt-Pruner, arXiv 2502.03460).

    Each step sums the gradients of the calibration batches, lets every layer lose a share of its units that is the
    larger the less the layer changes the hidden state (`layer_importance`, `adaptive_sparsity`), and removes those with
    the smallest ``Σ |w · ∂L/∂w|`` (`group_importance`). The last step removes only what is needed: what is left is at
    most the target, and below it by less than a neuron, or less than a head where no neuron could go instead.

    The model is changed in place, trains and generates as before; gradients that were there are cleared.

    Args:
        model: a causal language model of Llama's shape, on any device; in 4 bits (`convert_to_4bit`) it is measured
            through its 4-bit layers.
        target_parameters: parameters to be left, tied ones counted once; a float is a share of those there are.
        calibration: batches with ``input_ids`` and, if wanted, ``attention_mask`` and ``labels``. They are gone through
            once in every step: a `DataLoader` with ``shuffle=True`` over a fixed number of samples draws anew each
            time, a list has the same batches. An iterator is read once, and its batches serve all steps. The official
            runs draw 512 sequences of 64 tokens in each step.
        steps: the most steps, and the number by which `ratio` is divided. Default 50.
        amplitude: ``A``, how far the share that a layer loses differs from the mean. Default 0.02; 0 is uniform.
        ratio: ``R``: each step takes ``R/steps`` of the units on average. Default 1.0.
        multiple_of: what is left of an MLP, and of the inputs of ``o_proj``, is a multiple of this. Default `None`: the
            group of the 4-bit layers where it divides the present widths, else 1.
        prune_attention: cut heads too. Default `True`.
        keep_layers: indices of layers to leave whole; negative ones count from the end.
        seed: of what the batches draw, a new number in each step. The global generators are left alone.
        equal_widths: cut all layers alike, for engines that know one width only; `amplitude` then has no meaning.
        optimizer, optimizer_state: as in `prune_units`.
        show_progress: a bar over the steps, as transformers shows its own. Default `True`.

    Returns:
        What was done, with the kept indices of every layer. ``report.reached`` is False, and a warning says so, where
        `steps` were not enough. A target that the model is not above gives a warning and changes nothing.

    Raises:
        ValueError: an option out of range, a target below what is left with one unit per layer, no calibration batch or
            a loss that is not finite, a frozen, quantized, adapted, wrapped or sharded model.
        TypeError: no decoder layers of Llama's shape.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> shape = dict(vocab_size=8, hidden_size=8, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2)
        >>> model = LlamaForCausalLM(LlamaConfig(**shape))
        >>> batch = {"input_ids": torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0]])}
        >>> report = adapt_prune(model, 0.7, [batch], show_progress=False)
        >>> report.reached, sum(p.numel() for p in model.parameters()) == report.parameters_after
        (True, True)
    """
    options = Options(steps, amplitude, ratio, multiple_of, prune_attention, keep_layers, equal_widths, seed)
    run = _Run(model, options, OptimizerSurgeon(optimizer, optimizer_state))
    target = absolute_target(target_parameters, run.before)
    if target >= run.before:
        logger.warning(
            "the model has %d parameters, which is not above the target of %d: nothing done", run.before, target
        )
        return run.report(target)
    check_target(model, target, options)
    batches = reiterable(calibration)
    with progress.tqdm(total=steps, desc="Pruning", disable=None if show_progress else True) as bar:
        while count_parameters(model) > target and len(run.history) < steps:
            run.step(target, batches)
            bar.set_postfix(parameters=run.history[-1].parameters)
            bar.update()
    run.finish()
    report = run.report(target)
    if not report.reached:
        logger.warning(
            "after %d steps the model has %d parameters, above the target of %d; use a smaller amplitude (%s), a larger"
            " ratio (%s), or fewer keep_layers",
            *(len(run.history), report.parameters_after, target, amplitude, ratio),
        )
    return report


@dataclass
class _Run:
    """The state of one call of `adapt_prune`."""

    model: nn.Module
    options: Options
    surgeon: OptimizerSurgeon
    history: list[PruningStep] = field(default_factory=list)
    refused: int = 0

    def __post_init__(self) -> None:
        layers = find_layers(self.model)
        kept = kept_layers(self.options.keep_layers, len(layers))
        check_trainable(self.model, [layer for index, layer in enumerate(layers) if index not in kept])
        refuse_hooks(layers)
        self.before = count_parameters(self.model)
        self.initial = [{"neurons": layer.neurons, "kv_heads": layer.kv_heads} for layer in layers]
        self.kept: list[dict[str, Any]] = [
            {kind: list(range(count)) for kind, count in counts.items()} for counts in self.initial
        ]
        self.sparsity = torch.zeros(len(layers), dtype=torch.float64)

    def step(self, target: int, batches: Iterable[Mapping[str, Any]]) -> None:
        """Measure, choose, cut."""
        options, layers = self.options, find_layers(self.model)
        kept = kept_layers(options.keep_layers, len(layers))
        measured = [layer for index, layer in enumerate(layers) if index not in kept]
        importance, loss = calibrate(self.model, layers, measured, batches, options.seed + len(self.history))
        importance = shared_mean(importance, layers)
        self.sparsity = adaptive_sparsity(
            self.sparsity,
            torch.zeros_like(importance) if options.equal_widths else importance,
            step_size=options.ratio / options.steps,
            amplitude=options.amplitude,
        )
        scores: list[Any] = [None] * len(layers)
        for index, found in zip([i for i in range(len(layers)) if i not in kept], scores_of(measured), strict=True):
            scores[index] = found
        removed = _agreed(self._choose(layers, scores, target))
        self._cut(layers, removed)
        self.history.append(
            PruningStep(
                count_parameters(self.model), loss, tuple(importance.tolist()), tuple(self.sparsity.tolist()), removed
            )
        )

    def _choose(self, layers: list[DecoderLayer], scores: list[Any], target: int) -> tuple[LayerPlan, ...]:
        """What this step removes of each layer, as original indices."""
        chunks = []
        for supply in supplies(layers, self.options, scores, self.initial):
            count = to_remove(supply, float(self.sparsity[supply.layer]))
            self.refused += count is None
            chunks.append(lowest(supply, count or 0))
        excess = count_parameters(self.model) - target
        gone: list[dict[str, list[int]]] = [{"neurons": [], "kv_heads": []} for _ in layers]
        for bundle in trimmed(bundles(chunks, self.options.equal_widths), excess):
            for chunk in bundle:
                own = self.kept[chunk.supply.layer][chunk.supply.kind]
                gone[chunk.supply.layer][chunk.supply.kind] += [own[unit] for unit in chunk.units]
        for first, *others in shared_groups(layers):
            for other in others:
                gone[other] = gone[first]
        return tuple(LayerPlan(tuple(sorted(one["neurons"])), tuple(sorted(one["kv_heads"]))) for one in gone)

    def _cut(self, layers: list[DecoderLayer], removed: tuple[LayerPlan, ...]) -> None:
        plans = []
        for own, gone in zip(self.kept, removed, strict=True):
            plan: dict[str, Any] = {}
            for kind in ("neurons", "kv_heads"):
                out = set(getattr(gone, kind))
                plan[kind] = [position for position, unit in enumerate(own[kind]) if unit not in out]
                own[kind] = [unit for unit in own[kind] if unit not in out]
            plans.append(LayerPlan(**plan))
        self.model.zero_grad(set_to_none=True)
        cut_layers(layers, PruningPlan(plans), self.surgeon)

    def finish(self) -> None:
        """The config and the optimizer's moments follow, once."""
        note_widths(self.model, find_layers(self.model))
        self.surgeon.finish()

    def report(self, target: int) -> PruningReport:
        """What has been done so far."""
        return PruningReport(
            self.before,
            count_parameters(self.model),
            target,
            PruningPlan([LayerPlan(**kept) for kept in self.kept]),
            tuple(self.history),
            self.refused,
            names_of(self.model, self.surgeon.dropped),
        )


def _agreed(removed: tuple[LayerPlan, ...]) -> tuple[LayerPlan, ...]:
    """What the first process has chosen: scores may differ in the last bit between processes, and the cut must not."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return removed
    box = [removed]
    device = torch.device("cuda") if dist.get_backend() == "nccl" else None
    dist.broadcast_object_list(box, src=0, device=device)
    return box[0]
