"""Norms and largest entries of many tensors at once, whole even where the tensors are sharded over processes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_stablespam._sharded import all_reduce, layout, local, sharing


class Shards:
    """How the tensors of a list are sharded; reduces what each process found in its own shards.

    Args:
        tensors: N plain tensors or `DTensor`s. What is given to the methods is sharded in the same way.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.device = tensors[0].device if tensors else torch.device("cpu")
        self._layouts = [layout(tensor) for tensor in tensors]
        self._processes = sharing(self._layouts)

    def local(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The shards of N tensors that this process holds; plain tensors as they are."""
        return [local(tensor, as_laid_out) for tensor, as_laid_out in zip(tensors, self._layouts, strict=True)]

    def norms(self, *lists: Sequence[Tensor]) -> Tensor:
        """L2 norms of K lists of N local shards, as whole tensors: (K, N) float32, with one all-reduce for all."""
        norms = torch.stack([self._stack(_norms(shards)) for shards in lists])
        if not self._processes:
            return norms
        squares = norms.square()
        all_reduce(squares, self._processes, torch.distributed.ReduceOp.SUM)
        return squares.sqrt()

    def largest(self, shards: Sequence[Tensor]) -> Tensor:
        """Largest magnitude of each of N local shards, as whole tensors: (N,) float32. Nothing is said of `nan`."""
        return self.maxima([_largest(shard) for shard in shards])

    def maxima(self, values: Sequence[Tensor]) -> Tensor:
        """(N,) maxima of 0-dim values, one for each tensor, that each process found in its own shards."""
        maxima = self._stack(values)
        if self._processes:
            all_reduce(maxima[None], self._processes, torch.distributed.ReduceOp.MAX)
        return maxima

    def _stack(self, values: Sequence[Tensor]) -> Tensor:
        return torch.stack([value.to(self.device, torch.float32) for value in values])


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
