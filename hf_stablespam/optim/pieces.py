"""Tensors cut into pieces that stay in a processor's cache, and scratch memory for them."""

import torch
from torch import Tensor

PIECE = 1 << 18  # entries of scratch memory: 1 MiB of float32
LONG = 1 << 21  # entries that one operation reads after another: more would leave the cache in between


class Scratch:
    """Working memory for one piece in each role, reused throughout a step."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.largest = torch.finfo(dtype).max
        self._memory: dict[str, Tensor] = {}

    def take(self, role: str, entries: int) -> Tensor:
        """``entries`` numbers of working memory, not initialised."""
        if role not in self._memory:
            self._memory[role] = torch.empty(PIECE, dtype=self.dtype)
        return self._memory[role][:entries]

    def copied(self, role: str, value: Tensor) -> Tensor:
        """A copy of ``value`` in the working dtype."""
        return self.take(role, value.numel()).copy_(value)

    def widened(self, role: str, value: Tensor) -> Tensor:
        """``value`` itself if it has the working dtype, else a copy that has."""
        return value if value.dtype == self.dtype else self.copied(role, value)


def is_plain_tensor(*tensors: Tensor) -> bool:
    """Whether these are ordinary tensors with memory of their own, not `DTensor` or another subclass."""
    return all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors)


def share_layout(tensors: list[Tensor]) -> bool:
    """Whether the tensors fill memory without gaps or overlaps and in the same order, so that they can be flattened."""
    if all(tensor.is_contiguous() for tensor in tensors):
        return True
    strides = tensors[0].stride()
    return _is_gapless(tensors[0]) and all(tensor.stride() == strides for tensor in tensors)


def _is_gapless(tensor: Tensor) -> bool:
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def flat_view(tensor: Tensor) -> Tensor:
    """The entries of a gapless tensor in the order of memory, as a vector that shares their memory."""
    return tensor.view(-1) if tensor.is_contiguous() else tensor.as_strided((tensor.numel(),), (1,))


def cut(flat: Tensor, limit: int) -> tuple[Tensor, ...]:
    """Pieces of at most ``limit`` entries."""
    return (flat,) if flat.numel() <= limit else flat.split(limit)


def buckets(sizes: list[int], limit: int) -> list[range]:
    """Consecutive indices whose sizes add up to ``limit`` at most; what is larger stands alone.

    Example:
        >>> buckets([3, 4, 9, 1, 1], 8)
        [range(0, 2), range(2, 3), range(3, 5)]
    """
    starts, filled = [], limit + 1
    for index, size in enumerate(sizes):
        if filled + size > limit:
            starts.append(index)
            filled = 0
        filled += size
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], len(sizes)], strict=True)]
