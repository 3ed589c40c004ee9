"""One step of Stable-SPAM, for all tensors at once: measure, plan, measure what is clipped, plan, update.

Tensors are sorted into parts of one group, device, dtype and backend. A part's gradients are looked at as one: what a
backend finds, and what `plan` decides, are vectors with one entry per tensor. Sharded tensors take the same way; what
their processes find is put together between measuring and planning.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from hf_stablespam.optim.backends import choose_backend, kind_of
from hf_stablespam.optim.backends.base import Backend
from hf_stablespam.optim.backends.sharding import Meshes, local_batch
from hf_stablespam.optim.plan import (
    Batch,
    Clipped,
    Options,
    Plan,
    Result,
    Trackers,
    plan_clipping,
    plan_update,
    step_statistics,
)


class Part(NamedTuple):
    """Tensors that one backend takes together."""

    params: list[Tensor]  # as the optimizer has them: sharded ones are whole here, and local in the backend
    backend: Backend
    options: Options
    old: Trackers


def step(batches: list[tuple[Batch, Options]]) -> list[Result]:
    """Update parameters and their states in place, by the options of their groups; the statistics come in any order.

    A gradient whose squared norm is not finite (``nan``, ``inf``, or beyond the range of the statistics' dtype)
    changes nothing of its tensor.
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
    rows = list(zip(parts, measured, strict=True))
    clippings = [plan_clipping(part.old, seen.grad_max, part.options) for part, seen in rows]
    clipped = [
        part.backend.measure_clipped(seen, clipping)
        if part.options["clip_beta"] is not None
        else Clipped(seen.norm, torch.zeros_like(seen.norm))
        for (part, seen), clipping in zip(rows, clippings, strict=True)
    ]
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
        local, kinds = local_batch(batch), {}  # type: ignore[var-annotated]
        for index, row in enumerate(zip(*local, strict=True)):
            kinds.setdefault(kind_of(*row), []).append(index)
        for kind, chosen in kinds.items():
            backend = choose_backend(kind, options)(local.pick(chosen), options)
            parts.append(Part(batch.pick(chosen).params, backend, options, backend.read_trackers()))
    return parts
