"""One step of Stable-SPAM, for all tensors at once: measure, plan, measure what is clipped, plan, update.

Tensors are sorted into parts of one group, device, dtype and backend. A part's gradients are looked at as one: what a
backend finds, and what `plan` decides, are vectors with one entry per tensor. Sharded tensors take the same way; what
their processes find is put together between measuring and planning.
"""

from typing import Any

import torch
from torch import Tensor

from hf_stablespam.optim.backends import choose_backend, kind_of
from hf_stablespam.optim.backends.base import Backend
from hf_stablespam.optim.backends.sharding import Meshes, local_batch
from hf_stablespam.optim.plan import Batch, Clipped, Options, Plan, Result, plan_clipping, plan_update, step_statistics


class Part:
    """Tensors that one backend takes together."""

    def __init__(self, batch: Batch, backend: Backend) -> None:
        self.params = batch.params  # as the optimizer has them: sharded ones are whole here, and local in the backend
        self.backend, self.options, self.old = backend, backend.options, backend.read_trackers()


def step(batches: list[tuple[Batch, Options]]) -> list[Result]:
    """Update parameters and their states in place.

    A gradient whose squared norm is not finite (``nan``, ``inf``, or beyond the range of the statistics' dtype)
    changes nothing of its tensor.

    Args:
        batches: parameters, dense gradients and states, with the options of their group.

    Returns:
        The statistics, in any order.
    """
    results = []
    for part, plan, statistics in _planned(batches):
        part.backend.update(plan)
        results.append(Result(part.params, statistics))
    return results


def rescale(batches: list[tuple[Batch, Options]]) -> list[tuple[Result, list[Tensor]]]:
    """Write the trackers only, and return clipped and normalised copies of the gradients beside the statistics."""
    planned = _planned(batches)
    return [(Result(part.params, statistics), part.backend.rescale(plan)) for part, plan, statistics in planned]


def _planned(batches: list[tuple[Batch, Options]]) -> list[tuple[Part, Plan, dict[str, Tensor]]]:
    parts = _parts(batches)
    meshes = Meshes([part.params for part in parts])
    measured = meshes.whole_maxima([part.backend.measure() for part in parts])
    clippings = [
        plan_clipping(part.old, seen.grad_max, part.options) for part, seen in zip(parts, measured, strict=True)
    ]
    clipped = []
    for part, seen, clipping in zip(parts, measured, clippings, strict=True):
        clips = part.options["clip_beta"] is not None
        unclipped = Clipped(seen.norm, torch.zeros_like(seen.norm))
        clipped.append(part.backend.measure_clipped(seen, clipping) if clips else unclipped)
    measured, clipped = meshes.whole_norms(measured, clipped)
    planned = []
    for part, seen, clipping, rest in zip(parts, measured, clippings, clipped, strict=True):
        plan = plan_update(part.old, clipping, seen, rest, part.options)
        part.backend.write_trackers(plan.trackers)
        planned.append((part, plan, step_statistics(seen, clipping, rest, plan)))
    return planned


def _parts(batches: list[tuple[Batch, Options]]) -> list[Part]:
    parts = []
    for batch, options in batches:
        local, kinds = local_batch(batch), {}
        for index, row in enumerate(zip(*local, strict=True)):
            kinds.setdefault(kind_of(*row), []).append(index)
        for kind, chosen in kinds.items():
            backend = choose_backend(kind, options)
            parts.append(Part(batch.pick(chosen), backend(local.pick(chosen), options)))
    return parts
