"""Tensors that are sharded over processes (`DTensor`: FSDP2, HSDP, tensor parallelism), and sums and maxima of them.

Nothing here imports `torch.distributed.tensor`, which costs more than a second where nobody shards.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """How one tensor is sharded."""

    mesh: Any  # torch.distributed.DeviceMesh
    placements: Any  # one for each dimension of the mesh


class Processes(NamedTuple):
    """Processes that share tensors, and which of N tensors those are."""

    group: Any  # torch.distributed.ProcessGroup
    device: str  # where the group's backend wants its tensors
    tensors: list[int]


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a `DTensor`."""
    return hasattr(tensor, "device_mesh")


def layout(tensor: Any) -> Layout | None:
    """How a tensor is sharded, `None` for a plain one."""
    return Layout(tensor.device_mesh, tensor.placements) if is_sharded(tensor) else None


def local(tensor: Any, as_laid_out: Layout | None) -> Tensor:
    """This process's part of a tensor, laid out like the one that `as_laid_out` is of; a plain tensor as it is."""
    if as_laid_out is None:
        return tensor
    if tensor.placements != as_laid_out.placements:  # a replicated weight under tensor parallelism may get partial sums
        tensor = tensor.redistribute(*as_laid_out)
    return tensor.to_local()


def full(tensor: Any) -> Tensor:
    """The whole of a tensor, gathered from its processes; a plain tensor as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def sharing(layouts: Iterable[Layout | None]) -> list[Processes]:
    """The process groups over which tensors are sharded, in the order of first appearance: the same everywhere.

    Replicated dimensions of a mesh, and those of a single process, are left out.
    """
    found: dict[tuple[int, ...], Processes] = {}
    for index, one in enumerate(layouts):
        for dim, placement in enumerate(one.placements if one else ()):
            mesh = one.mesh  # type: ignore[union-attr]
            if not placement.is_replicate() and mesh.size(dim) > 1:
                group = mesh.get_group(dim)
                ranks = tuple(torch.distributed.get_process_group_ranks(group))
                found.setdefault(ranks, Processes(group, mesh.device_type, [])).tensors.append(index)
    return list(found.values())


def all_reduce(values: Tensor, processes: Sequence[Processes], op: Any) -> None:
    """Reduce (K, N) values in place, one column for each tensor, over the processes that share it: one call a group."""
    for group, device, tensors in processes:
        columns = values[:, tensors].to(device)
        torch.distributed.all_reduce(columns, op, group=group)
        values[:, tensors] = columns.to(values.device)
