"""The passes on CUDA by `triton_kernels`: eight over tensors where fused AdamW makes seven, nothing read to the host.

Usable in a CUDA graph after a warm-up step. Not yet run on a GPU: tested in Triton's interpreter.
"""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from hf_stablespam.optim.backends import triton_kernels as kernels
from hf_stablespam.optim.backends.base import Backend, norms_of_tensors, of_tensors
from hf_stablespam.optim.plan import MOMENTS, Batch, Clipped, Clipping, Measured, Options, Plan


class Sizes(NamedTuple):
    """What follows from the sizes of the tensors, on the device; int64."""

    sizes: Tensor  # (tensors,) entries
    owners: Tensor  # (chunks,) the tensor of each chunk
    starts: Tensor  # (chunks,) its first entry
    counts: Tensor  # (tensors,) number of chunks


# The numbers of the last step and what was made of them, by the first of its tensors: they live as long as it does.
_SIZES, _ADDRESSES = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()


class TritonOps(Backend):
    """Tables of addresses for `triton_kernels`."""

    label = "Triton's kernels"

    def __init__(self, batch: Batch, options: Options) -> None:
        super().__init__(batch, options)
        self.device = batch.params[0].device
        pairs = list(zip(batch.states, batch.grads, strict=True))
        moments = [[state.get(name, grad) for state, grad in pairs] for name in MOMENTS]
        self.columns = [batch.params, batch.grads, *moments]
        first, addresses = batch.params[0], [[tensor.data_ptr() for tensor in column] for column in self.columns]
        self.tables = _remembered(_SIZES, first, [param.numel() for param in batch.params], _sizes)
        self.addresses = _remembered(_ADDRESSES, first, addresses, _on_device)
        self.where = self.tables.owners, self.tables.starts, self.tables.sizes
        self.chunk_max, self.chunk_norm = torch.empty(2, len(self.tables.owners), device=self.device)

    def measure(self) -> Measured:
        self._run(kernels.measure, self.addresses[1], self.batch.grads[0], *self.where, self.chunk_max, self.chunk_norm)
        grad_max = of_tensors(self.chunk_max, "max", self.tables.counts)
        return Measured(grad_max, norms_of_tensors(self.chunk_norm, self.tables.owners, grad_max, self.tables.counts))

    def measure_clipped(self, measured: Measured, clipping: Clipping) -> Clipped:
        norms, entries = self.chunk_norm.clone(), torch.zeros_like(self.chunk_norm)
        grads = self.addresses[1], self.batch.grads[0], *self.where, self.chunk_max
        self._run(kernels.measure_clipped, *grads, clipping.threshold, clipping.ratio, norms, entries)
        norm = norms_of_tensors(norms, self.tables.owners, measured.grad_max, self.tables.counts)
        return Clipped(norm, of_tensors(entries, "sum", self.tables.counts))

    def update(self, plan: Plan) -> None:
        stochastic = self.options["stochastic_rounding"] and self.batch.params[0].dtype == torch.bfloat16
        seed = torch.randint(1 << 31, (1,), device=self.device) if stochastic else self.tables.counts
        likes, numbers = [column[0] for column in self.columns[:3]], (*_numbers(plan), seed)
        self._run(kernels.update, *self.addresses.unbind(), *likes, *self.where, *numbers, STOCHASTIC=stochastic)
        torch.autograd.graph.increment_version(self.batch.params)

    def rescale(self, plan: Plan) -> list[Tensor]:
        new = [torch.empty_like(grad) for grad in self.batch.grads]
        (targets,) = _on_device([[grad.data_ptr() for grad in new]], self.device)
        self._run(kernels.rescale, targets, self.addresses[1], new[0], *self.where, *_numbers(plan))
        return new

    def _run(self, kernel: Any, *arguments: Any, **constants: Any) -> None:
        """One program for each chunk, on the device of the tensors, which need not be the current one."""
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            kernel[(len(self.tables.owners),)](*arguments, BLOCK=kernels.BLOCK, **constants)


def _numbers(plan: Plan) -> tuple[Tensor, Tensor]:
    return plan.finite.to(torch.float32), torch.stack(plan.by, dim=1)


def _remembered(cache: WeakTensorKeyDictionary, first: Tensor, numbers: Any, make: Any) -> Any:
    """What ``make`` makes of some numbers, made anew where they have changed since the last step."""
    if first not in cache or cache[first][0] != numbers:
        cache[first] = numbers, make(numbers, first.device)
    return cache[first][1]


def _sizes(numbers: list[int], device: torch.device) -> Sizes:
    counts = [-(-size // kernels.BLOCK) for size in numbers]
    owners = [owner for owner, count in enumerate(counts) for _ in range(count)]
    starts = [chunk * kernels.BLOCK for count in counts for chunk in range(count)]
    return Sizes(*(torch.tensor(column, device=device) for column in (numbers, owners, starts, counts)))


def _on_device(addresses: list[list[int]], device: torch.device) -> Tensor:
    return torch.tensor(addresses, dtype=torch.int64).to(device, non_blocking=True)
