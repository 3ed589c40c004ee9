"""Sharded parameters (`DTensor`: FSDP2, HSDP, tensor parallel), by statistics of the whole tensors.

Letting each `DTensor` reduce itself costs two collectives per tensor and statistic. Here every process measures its own
shards, and what it found travels stacked: one maximum (AdaClip's threshold needs it first) and one sum (AdaGN needs the
norm of the clipped gradient) serve all tensors of the step.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hf_stablespam.optim.formulas import scale_of
from hf_stablespam.optim.plan import Batch, Clipped, Measured


class _Processes(NamedTuple):
    """A process group, and which of the step's tensors are sharded over it."""

    group: dist.ProcessGroup
    device: str  # where the group's backend wants its tensors
    tensors: list[int]


class Meshes:
    """Who shares which tensors of a step.

    Costs one ``MAX`` and one ``SUM`` all-reduce for each process group over which any of the tensors is sharded: two
    for FSDP2 and HSDP, four for FSDP2 with tensor parallelism, none where nothing is sharded. Every process of a mesh
    must come with the same parameters.

    Args:
        params: those of each part of the step.

    Raises:
        ValueError: for a parameter that holds a partial sum.
    """

    def __init__(self, params: list[list[Any]]) -> None:
        self.processes = _processes([param for part in params for param in part])

    def whole_maxima(self, measured: list[Measured]) -> list[Measured]:
        """The largest entries of whole tensors; norms are still those of the shards."""
        if not self.processes:
            return measured
        rows = []
        for seen in measured:  # a backend's MAX may lose nan
            is_nan = seen.grad_max.isnan()
            rows.append(torch.stack([seen.grad_max.masked_fill(is_nan, 0), is_nan.to(seen.grad_max)]))
        largest = self._all_reduce(rows, dist.ReduceOp.MAX)
        return [
            Measured(grad_max.masked_fill(is_nan > 0, torch.nan), seen.norm)
            for (grad_max, is_nan), seen in zip(largest, measured, strict=True)
        ]

    def whole_norms(self, measured: list[Measured], clipped: list[Clipped]) -> tuple[list[Measured], list[Clipped]]:
        """Norms before and after clipping, and counts of clipped entries, of whole tensors."""
        if not self.processes:
            return measured, clipped
        rows, scales = [], [scale_of(seen.grad_max) for seen in measured]
        for seen, rest, scale in zip(measured, clipped, scales, strict=True):
            squares = [(norm / scale).square() for norm in (seen.norm, rest.norm)]
            rows.append(torch.stack([*squares, rest.entries.to(scale)]))
        sums = self._all_reduce(rows, dist.ReduceOp.SUM)
        for index, (scale, (square, clipped_square, entries)) in enumerate(zip(scales, sums, strict=True)):
            measured[index] = measured[index]._replace(norm=scale * square.sqrt())
            clipped[index] = Clipped(scale * clipped_square.sqrt(), entries)
        return measured, clipped

    def _all_reduce(self, rows: list[Tensor], op: Any) -> list[Tensor]:
        """Reduce the columns of matrices, one column per tensor, each over the processes that share its tensor."""
        columns = [column for matrix in rows for column in matrix.unbind(1)]
        for group, device, tensors in self.processes:
            together = torch.stack([columns[index].to(device) for index in tensors], dim=1)
            dist.all_reduce(together, op, group=group)
            for index, column in zip(tensors, together.unbind(1), strict=True):
                columns[index] = column.to(columns[index])
        rest = iter(columns)
        return [torch.stack([next(rest) for _ in range(matrix.shape[1])], dim=1) for matrix in rows]


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a `DTensor` (told without the import, which costs a second where nobody shards)."""
    return hasattr(tensor, "device_mesh")


def local_batch(batch: Batch) -> Batch:
    """This process's part of each tensor."""
    if not any(is_sharded(param) for param in batch.params):
        return batch
    grads = [_like(grad, param) for param, grad in zip(batch.params, batch.grads, strict=True)]
    states = [{name: _local(value) for name, value in state.items()} for state in batch.states]
    return Batch([_local(param) for param in batch.params], [_local(grad) for grad in grads], states)


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if is_sharded(tensor) else tensor


def _like(grad: Any, param: Any) -> Any:
    """The gradient laid out as the parameter: a replicated weight may get partial sums under tensor parallelism."""
    if not is_sharded(param) or grad.placements == param.placements:
        return grad
    return grad.redistribute(param.device_mesh, param.placements)


def _processes(params: list[Any]) -> list[_Processes]:
    """The process groups to reduce over, in the order of first appearance: the same on every process."""
    found: dict[tuple[int, ...], _Processes] = {}
    for index, param in enumerate(params):
        if not is_sharded(param):
            continue
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
