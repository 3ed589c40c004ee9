"""What fails on one process of several fails on all: the others would wait for it in their next collective."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hf_stablespam._sharded import is_sharded


def groups_of(tensors: Iterable[Any]) -> list[Any]:
    """The process groups over which tensors are sharded or replicated as `DTensor`; none for plain tensors.

    In the order of first appearance, which is the same everywhere. Processes of a mesh that do not share a shard are in
    a group too: they gather together.
    """
    found: dict[tuple[int, ...], Any] = {}
    for mesh in dict.fromkeys(tensor.device_mesh for tensor in tensors if is_sharded(tensor)):
        for dim in range(mesh.ndim):
            if mesh.size(dim) > 1:
                group = mesh.get_group(dim)
                found.setdefault(tuple(torch.distributed.get_process_group_ranks(group)), group)
    return list(found.values())


def all_processes() -> list[Any]:
    """The group of all processes, where there are several."""
    known = torch.distributed.is_available() and torch.distributed.is_initialized()
    return [torch.distributed.group.WORLD] if known and torch.distributed.get_world_size() > 1 else []


@contextmanager
def shared_errors(groups: list[Any]) -> Iterator[Callable[[], None]]:
    """A block that all processes of some groups enter: what one of them raises in it, all raise at its end.

    It gives a function that all call before each collective operation in the block; it raises what another process has
    raised since. An error in the operation itself stays where it is, because others may stand in that operation: out of
    memory, and what `torch.distributed` raises.

    Args:
        groups: of `groups_of` or `all_processes`; without any, the block is as if it were not there.

    Raises:
        Exception: this process's own, or else another's: of the same class, or a `RuntimeError` where that cannot be
            sent.

    Example:
        >>> with shared_errors([]) as meet:
        ...     meet()  # before a tensor is gathered
    """
    over = not groups

    def meet(own: Exception | None = None) -> None:
        nonlocal over
        over = True  # also where this fails itself
        error = _exchanged(own, groups)
        if error is not None and own is None:
            raise error
        over = error is not None or not groups

    try:
        yield meet
    except Exception as error:
        if not over and not isinstance(error, (MemoryError, torch.OutOfMemoryError, torch.distributed.DistError)):
            meet(error)
        raise
    else:
        meet()


def _exchanged(own: Exception | None, groups: list[Any]) -> Exception | None:
    """An error of any process, this one's first."""
    error = None if own is None else _sendable(own)
    for group in groups:
        errors: list[Exception | None] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(errors, error, group=group)
        error = next((one for one in (error, *errors) if one is not None), None)
    return error


def _sendable(error: Exception) -> Exception:
    """The error, or one that says the same, without what cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its class does
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
