"""Norms and largest entries of many tensors at once, whole even where the tensors are sharded over processes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Group(NamedTuple):
    """Processes that share tensors, and which tensors."""

    group: Any  # torch.distributed.ProcessGroup
    device: str  # where its backend wants tensors
    indices: list[int]


class Shards:
    """How the tensors of a list are sharded; reduces what each process found in its own shards.

    Args:
        tensors: N plain tensors or `DTensor`s. What is given to the methods is sharded in the same way.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.device = tensors[0].device if tensors else torch.device("cpu")
        self._layouts = [_layout(tensor) for tensor in tensors]
        found: dict[tuple[int, ...], _Group] = {}
        for index, layout in enumerate(self._layouts):
            if layout is not None:
                _note_groups(found, index, *layout)
        self._groups = list(found.values())

    def local(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The shards of N tensors that this process holds; plain tensors as they are."""
        return [_local(tensor, layout) for tensor, layout in zip(tensors, self._layouts, strict=True)]

    def norms(self, *lists: Sequence[Tensor]) -> Tensor:
        """L2 norms of K lists of N local shards, as whole tensors: (K, N) float32, with one all-reduce for all."""
        norms = torch.stack([self._stack(_norms(shards)) for shards in lists])
        if not self._groups:
            return norms
        squares = norms.square()
        self._all_reduce(squares, torch.distributed.ReduceOp.SUM)
        return squares.sqrt()

    def largest(self, shards: Sequence[Tensor]) -> Tensor:
        """Largest magnitude of each of N local shards, as whole tensors: (N,) float32. Nothing is said of `nan`."""
        return self.maxima([_largest(shard) for shard in shards])

    def maxima(self, values: Sequence[Tensor]) -> Tensor:
        """(N,) maxima of 0-dim values, one for each tensor, that each process found in its own shards."""
        maxima = self._stack(values)
        if self._groups:
            self._all_reduce(maxima[None], torch.distributed.ReduceOp.MAX)
        return maxima

    def _stack(self, values: Sequence[Tensor]) -> Tensor:
        return torch.stack([value.to(self.device, torch.float32) for value in values])

    def _all_reduce(self, values: Tensor, op: Any) -> None:
        """Reduce (K, N) values in place, each column over the processes that share the tensor."""
        for group, device, indices in self._groups:
            columns = values[:, indices].to(device)
            torch.distributed.all_reduce(columns, op, group=group)
            values[:, indices] = columns.to(values.device)


def _layout(tensor: Any) -> Any:
    return (tensor.device_mesh, tensor.placements) if hasattr(tensor, "device_mesh") else None


def _note_groups(found: dict[tuple[int, ...], _Group], index: int, mesh: Any, placements: Any) -> None:
    for dim, placement in enumerate(placements):
        if not placement.is_replicate() and mesh.size(dim) > 1:
            group = mesh.get_group(dim)
            ranks = tuple(torch.distributed.get_process_group_ranks(group))
            found.setdefault(ranks, _Group(group, mesh.device_type, [])).indices.append(index)


def _local(tensor: Any, layout: Any) -> Tensor:
    if layout is None:
        return tensor
    mesh, placements = layout
    if tensor.placements != placements:  # a replicated weight under tensor parallelism may get partial sums
        tensor = tensor.redistribute(mesh, placements)
    return tensor.to_local()


def _norms(shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """In float32, in which the squares of half precision fit, and in one kernel for many tensors on a GPU."""
    single = [shard.float() if shard.dtype == torch.float64 else shard for shard in shards]
    return torch._foreach_norm(single, 2, dtype=torch.float32)


def _largest(shard: Tensor) -> Tensor:
    if shard.numel() == 0:
        return shard.new_zeros(())
    if shard.is_cpu:  # there a norm of order infinity takes ten times as long
        low, high = torch.aminmax(shard)
        return torch.maximum(-low, high)
    return torch.linalg.vector_norm(shard, torch.inf)
