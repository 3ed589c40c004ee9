"""One step of Stable-SPAM for sharded parameters (`DTensor`: FSDP2, HSDP, tensor parallel), by whole-tensor statistics.

Letting each `DTensor` reduce itself costs two collectives per tensor and statistic. Here every process measures its own
shards, and what it found travels stacked: one maximum (AdaClip's threshold needs it first) and one sum (AdaGN needs the
norm of the clipped gradient) serve all tensors of the step. The rest is the multi-tensor path, on the shards.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hf_stablespam.optim.multi_tensor import clip, maxima, norms, update, working_copies
from hf_stablespam.optim.pieces import buckets
from hf_stablespam.optim.plan import (
    Batch,
    Clipping,
    Options,
    Plan,
    Result,
    Trackers,
    plan_adam,
    plan_clipping,
    stack_trackers,
    step_statistics,
    store_trackers,
)


class Shards(NamedTuple):
    """Sharded parameters of one group, device and dtype, as this process holds them."""

    options: Options
    params: list[Any]  # DTensors
    local: Batch  # this process's part of each
    old: Trackers

    def buckets(self) -> Iterator[tuple[slice, Batch]]:
        """Consecutive shards, together no larger than the largest, so that no temporary is."""
        sizes = [grad.numel() for grad in self.local.grads]
        for bucket in buckets(sizes, max(sizes)):
            yield slice(bucket.start, bucket.stop), self.local.pick(bucket)

    def copies(self, bucket: Batch) -> list[Tensor]:
        """Gradients to work on. They are made anew for each sweep, rather than kept for all tensors."""
        return working_copies(bucket.grads, self.old.clip_max.dtype, self.options)


class _Processes(NamedTuple):
    """A process group, and which of the step's tensors are sharded over it."""

    group: dist.ProcessGroup
    device: str  # where the group's backend wants its tensors
    tensors: list[int]


def set_sharded_apart(
    batches: list[tuple[Batch, Options]],
) -> tuple[list[tuple[Batch, Options]], list[Shards]]:
    """Batches without what is sharded, and what is sharded."""
    whole, sharded = [], []
    for batch, options in batches:
        sets: dict[Any, list[int]] = {}
        for index, param in enumerate(batch.params):
            key = (param.device, param.dtype) if is_sharded(param) else None
            sets.setdefault(key, []).append(index)
        whole.append((batch.pick(sets.pop(None)) if None in sets else Batch([], [], []), options))
        sharded += [_shards(batch.pick(indices), options) for indices in sets.values()]
    return whole, sharded


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a `DTensor` (told without the import, which costs a second where nobody shards)."""
    return hasattr(tensor, "device_mesh")


def sharded_step(parts: list[Shards]) -> list[Result]:
    """Update all sharded parameters of a step, and their states, in place.

    Costs one ``MAX`` and one ``SUM`` all-reduce for each process group over which any of the tensors is sharded: two
    for FSDP2 and HSDP, four for FSDP2 with tensor parallelism. Every process of a mesh must call it with the same
    parameters.

    Args:
        parts: the sharded parameters that have a gradient, from `set_sharded_apart`.

    Returns:
        The statistics of the whole tensors.

    Raises:
        ValueError: for a parameter that holds a partial sum.
    """
    processes = _processes([param for part in parts for param in part.params])
    largest = _all_reduce([_local_maxima(part) for part in parts], processes, dist.ReduceOp.MAX)
    clippings = []
    for part, (grad_max, has_nan) in zip(parts, largest, strict=True):
        grad_max = grad_max.masked_fill(has_nan > 0, torch.nan)
        clippings.append((grad_max, plan_clipping(part.old, grad_max, part.options)))
    sums = [_local_sums(part, *clipping) for part, clipping in zip(parts, clippings, strict=True)]
    sums = _all_reduce(sums, processes, dist.ReduceOp.SUM)
    return [_apply(part, *clipping, *rows) for part, clipping, rows in zip(parts, clippings, sums, strict=True)]


def _shards(batch: Batch, options: Options) -> Shards:
    """This process's part of each tensor; an empty one becomes a zero, as multi-tensor operations refuse empty ones."""

    def local(tensor: Any) -> Tensor:
        part = tensor.to_local() if is_sharded(tensor) else tensor
        return part if part.numel() > 0 else part.new_zeros(1)

    grads = [_like(grad, param) for param, grad in zip(batch.params, batch.grads, strict=True)]
    states = [{name: local(value) for name, value in state.items()} for state in batch.states]
    shards = Batch([local(param) for param in batch.params], [local(grad) for grad in grads], states)
    return Shards(options, batch.params, shards, stack_trackers(batch.states))


def _like(grad: Any, param: Any) -> Any:
    """The gradient laid out as the parameter: a replicated weight may get partial sums under tensor parallelism."""
    return grad if grad.placements == param.placements else grad.redistribute(param.device_mesh, param.placements)


def _processes(params: list[Any]) -> list[_Processes]:
    """The process groups to reduce over, in the order of first appearance: the same on every process."""
    found: dict[tuple[int, ...], _Processes] = {}
    for index, param in enumerate(params):
        mesh = param.device_mesh
        for dim, placement in enumerate(param.placements):
            if placement.is_partial():
                raise ValueError(
                    f"parameters must be sharded or replicated, got {placement} on dimension {dim} of {mesh} for a "
                    f"parameter of shape {tuple(param.shape)}; redistribute it with Shard or Replicate"
                )
            if not placement.is_replicate() and mesh.size(dim) > 1:
                group = mesh.get_group(dim)
                ranks = tuple(dist.get_process_group_ranks(group))
                found.setdefault(ranks, _Processes(group, mesh.device_type, [])).tensors.append(index)
    return list(found.values())


def _all_reduce(rows: list[Tensor], processes: list[_Processes], op: Any) -> list[Tensor]:
    """Reduce the columns of matrices, one column per tensor, each over the processes that share its tensor."""
    columns = [column for matrix in rows for column in matrix.unbind(1)]
    for group, device, tensors in processes:
        together = torch.stack([columns[index].to(device) for index in tensors], dim=1)
        dist.all_reduce(together, op, group=group)
        for index, column in zip(tensors, together.unbind(1), strict=True):
            columns[index] = column.to(columns[index])
    rest = iter(columns)
    return [torch.stack([next(rest) for _ in range(matrix.shape[1])], dim=1) for matrix in rows]


def _local_maxima(part: Shards) -> Tensor:
    """``max|g|`` and whether there is a ``nan``, which the backends' ``MAX`` may lose; (2, tensors)."""
    largest = torch.cat([maxima(part.copies(bucket)) for _, bucket in part.buckets()])
    is_nan = largest.isnan()
    return torch.stack([largest.masked_fill(is_nan, 0), is_nan.to(largest)])


def _local_sums(part: Shards, grad_max: Tensor, clipping: Clipping) -> Tensor:
    """``Σ(g/gmax)²`` before and after clipping, and the number of clipped entries; (3, tensors)."""
    columns = []
    for where, bucket in part.buckets():
        work, largest = part.copies(bucket), grad_max[where]
        grad_norm = norms(work, largest)
        _, clipped, norm = clip(work, largest, grad_norm, _some(clipping, where), part.options)
        scale = _scale(largest)
        columns.append(torch.stack([(grad_norm / scale).square(), (norm / scale).square(), clipped.to(norm)]))
    return torch.cat(columns, dim=1)


def _scale(grad_max: Tensor) -> Tensor:
    """By what gradients are divided before they are squared, to stay within float32's range."""
    return torch.where(grad_max > 0, grad_max, 1)


def _apply(
    part: Shards, grad_max: Tensor, clipping: Clipping, squares: Tensor, clipped_squares: Tensor, clipped: Tensor
) -> Result:
    """AdaGN and Adam on the shards, by what is now known of the whole tensors."""
    grad_norm, norm = (_scale(grad_max) * total.sqrt() for total in (squares, clipped_squares))
    plan = plan_adam(part.old, clipping, grad_norm, norm, part.options)
    store_trackers(part.local.states, plan.trackers)
    for where, bucket in part.buckets():
        work, _, _ = clip(part.copies(bucket), grad_max[where], norm[where], _some(clipping, where), part.options)
        update(bucket, work, _some(plan, where), part.options)
    return Result(part.params, step_statistics(grad_norm, grad_max, clipping, clipped, norm, plan))


def _some(plan: Any, where: slice) -> Any:
    """The entries of some tensors from a named tuple of vectors."""
    if isinstance(plan, (Clipping, Plan, Trackers)):
        return type(plan)(*(_some(column, where) for column in plan))
    return plan[where]
