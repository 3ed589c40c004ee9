"""The passes on CUDA by `triton_kernels`: eight over tensors where fused AdamW makes seven, nothing read to the host.

Usable in a CUDA graph after a warm-up step. Not yet run on a GPU: tested in Triton's interpreter.
"""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from hf_stablespam.optim.backends import triton_kernels as kernels
from hf_stablespam.optim.backends.base import Backend
from hf_stablespam.optim.formulas import scale_of
from hf_stablespam.optim.plan import MOMENTS, Batch, Clipped, Clipping, Measured, Options, Plan


class Sizes(NamedTuple):
    """What follows from the sizes of the tensors, on the device; int64."""

    numbers: tuple[int, ...]  # the sizes that it was made for
    sizes: Tensor  # (tensors,) entries
    owners: Tensor  # (chunks,) the tensor of each chunk
    starts: Tensor  # (chunks,) its first entry
    counts: Tensor  # (tensors,) number of chunks


class Addresses(NamedTuple):
    """Where the tensors are in this step."""

    numbers: list[list[int]]
    rows: Tensor  # (4, tensors) int64 on the device: weights, gradients, M, V


# The tables of the last step by the first of the tensors that they are for: they live as long as it does.
_SIZES, _ADDRESSES = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()


class TritonOps(Backend):
    """Tables of addresses for `triton_kernels`."""

    def __init__(self, batch: Batch, options: Options) -> None:
        super().__init__(batch, options)
        self.device = batch.params[0].device
        self.on_device: Any = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        moments = [
            [state.get(name, grad) for state, grad in zip(batch.states, batch.grads, strict=True)] for name in MOMENTS
        ]
        self.columns = [batch.params, batch.grads, *moments]
        self.tables, self.addresses = _sizes_of(batch.params), _addresses_of(self.columns)
        self.where = (self.tables.owners, self.tables.starts, self.tables.sizes)
        self.grid = (len(self.tables.owners),)
        self.chunk_max = torch.empty(self.grid, dtype=torch.float32, device=self.device)
        self.chunk_norm = torch.empty_like(self.chunk_max)

    def measure(self) -> Measured:
        with self.on_device:
            kernels.measure[self.grid](
                *(self.addresses[1], self.batch.grads[0], *self.where, self.chunk_max, self.chunk_norm),
                BLOCK=kernels.BLOCK,
            )
        grad_max = self._of_tensors(self.chunk_max, "max")
        return Measured(grad_max, self._norms(self.chunk_norm, grad_max))

    def measure_clipped(self, measured: Measured, clipping: Clipping) -> Clipped:
        if not self.clips:
            return self.unclipped(measured)
        norms, entries = self.chunk_norm.clone(), torch.zeros_like(self.chunk_norm)
        with self.on_device:
            kernels.measure_clipped[self.grid](
                *(self.addresses[1], self.batch.grads[0], *self.where, self.chunk_max),
                *(clipping.threshold, clipping.ratio, norms, entries),
                BLOCK=kernels.BLOCK,
            )
        return Clipped(self._norms(norms, measured.grad_max), self._of_tensors(entries, "sum"))

    def update(self, plan: Plan) -> None:
        stochastic = self.options["stochastic_rounding"] and self.batch.params[0].dtype == torch.bfloat16
        seed = torch.randint(1 << 31, (1,), device=self.device) if stochastic else self.tables.counts
        likes = [column[0] for column in self.columns[:3]]
        with self.on_device:
            kernels.update[self.grid](
                *(*self.addresses.unbind(), *likes, *self.where),
                *(plan.finite.to(torch.float32), torch.stack(plan.by, dim=1), seed),
                BLOCK=kernels.BLOCK,
                STOCHASTIC=stochastic,
            )
        torch.autograd.graph.increment_version(self.batch.params)

    def rescale(self, plan: Plan) -> list[Tensor]:
        new = [torch.empty_like(grad) for grad in self.batch.grads]
        targets = torch.tensor([grad.data_ptr() for grad in new], dtype=torch.int64).to(self.device, non_blocking=True)
        with self.on_device:
            kernels.rescale[self.grid](
                *(targets, self.addresses[1], new[0], *self.where),
                *(plan.finite.to(torch.float32), torch.stack(plan.by, dim=1)),
                BLOCK=kernels.BLOCK,
            )
        return new

    def _of_tensors(self, chunks: Tensor, reduce: str) -> Tensor:
        return torch.segment_reduce(chunks, reduce, lengths=self.tables.counts, unsafe=True, initial=0)

    def _norms(self, chunk_norm: Tensor, grad_max: Tensor) -> Tensor:
        """Norms of tensors from those of their chunks, scaled so that squares stay in range."""
        scale = scale_of(grad_max)
        return scale * self._of_tensors((chunk_norm / scale[self.tables.owners]).square(), "sum").sqrt()


def _sizes_of(params: list[Tensor]) -> Sizes:
    """Built once: sizes change with the set of tensors only."""
    numbers = tuple(param.numel() for param in params)
    known = _SIZES.get(params[0])
    if known is None or known.numbers != numbers:
        counts = [-(-size // kernels.BLOCK) for size in numbers]
        owners = [owner for owner, count in enumerate(counts) for _ in range(count)]
        starts = [chunk * kernels.BLOCK for count in counts for chunk in range(count)]
        columns = (torch.tensor(column, device=params[0].device) for column in (numbers, owners, starts, counts))
        known = _SIZES[params[0]] = Sizes(numbers, *columns)
    return known


def _addresses_of(columns: list[list[Tensor]]) -> Tensor:
    """Four numbers per tensor, copied to the device where they have changed since the last step."""
    numbers = [[tensor.data_ptr() for tensor in column] for column in columns]
    known = _ADDRESSES.get(columns[0][0])
    if known is None or known.numbers != numbers:
        rows = torch.tensor(numbers, dtype=torch.int64).to(columns[0][0].device, non_blocking=True)
        known = _ADDRESSES[columns[0][0]] = Addresses(numbers, rows)
    return known.rows
