"""The passes on the CPU by `numba_kernels`: where everything is, and where Numba cannot be used."""

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_stablespam.optim.backends.base import Backend, of_tensors
from hf_stablespam.optim.formulas import Coefficients
from hf_stablespam.optim.plan import CHANGING, MOMENTS, Batch, Clipped, Clipping, Measured, Options, Plan, Trackers

# how an array shows a tensor's entries, and their bits as signed integers
_STORED = {torch.float32: np.float32, torch.float64: np.float64, torch.bfloat16: np.uint16}
_BITS = {torch.float32: np.int32, torch.float64: np.int64, torch.bfloat16: np.int16}
_COUNTERS = ("step", "moment_step", "adopted_at", "clip_since")  # float32 whatever the others are
SHORT = 32  # chunks that one thread has done before a second one begins


class NumbaOps(Backend):
    """Tables of addresses for `numba_kernels`."""

    label = "Numba's kernels"

    def __init__(self, batch: Batch, options: Options) -> None:
        super().__init__(batch, options)
        kernels = load()
        assert kernels is not None
        moments = [[state[name] for state in batch.states] for name in MOMENTS if name in batch.states[0]]
        self.kernels, self.columns = kernels, [batch.params, batch.grads, *moments]
        self.addresses, self.likes = _addresses(*self.columns), [_like(column[0].dtype) for column in self.columns]
        self.grads = self.addresses[1], self.likes[1], _STORED[self.precise](0)
        sizes = np.array([grad.numel() for grad in batch.grads])
        counts = -(-sizes // kernels.CHUNK)
        self.table = kernels.Table(sizes, counts.cumsum() - counts, np.repeat(np.arange(len(sizes)), counts))
        self.counts, self.owners = torch.from_numpy(counts), self.table.owners
        self.maxima, self.sums = np.empty(len(self.owners), _STORED[self.precise]), np.empty(len(self.owners))

    def read_trackers(self) -> Trackers:
        vectors = np.empty((len(Trackers._fields), len(self.batch.states)), _STORED[self.precise])
        self._copy_trackers(Trackers._fields, vectors, False)
        return Trackers(*torch.from_numpy(vectors))

    def write_trackers(self, trackers: Tensor) -> None:
        self._copy_trackers(CHANGING, trackers.numpy(), True)

    def measure(self) -> Measured:
        found = _like(self.batch.grads[0].dtype, bits=True), self.maxima.view(_BITS[self.precise]), self.sums
        self._share_out(self.kernels.measure, np.arange(len(self.owners)), *self.grads, *found)
        return Measured(of_tensors(torch.from_numpy(self.maxima), "max", self.counts), self._norms())

    def measure_clipped(self, measured: Measured, clipping: Clipping) -> Clipped:
        limits, entries = (clipping.threshold.numpy(), clipping.ratio.numpy()), np.zeros(len(self.owners), np.int64)
        spiky = np.flatnonzero(self.maxima > limits[0][self.owners])  # the other chunks keep what they have
        self._share_out(self.kernels.measure_clipped, spiky, *self.grads, limits, self.sums, entries)
        return Clipped(self._norms(), of_tensors(torch.from_numpy(entries).to(self.precise), "sum", self.counts))

    def _norms(self) -> Tensor:
        return of_tensors(torch.from_numpy(self.sums), "sum", self.counts).sqrt_().to(self.precise)

    def update(self, plan: Plan) -> None:
        stochastic = self.options["stochastic_rounding"] and self.batch.params[0].dtype == torch.bfloat16
        seed = int(torch.randint(1 << 32, ())) if stochastic else 0
        tables = self.addresses, tuple(self.likes[:3]), _rows(plan.by)
        self._share_out(self.kernels.update, self._chunks_of(plan.finite), *tables, stochastic, seed)
        torch.autograd.graph.increment_version(self.batch.params)  # as torch's own operations do: autograd notices

    def rescale(self, plan: Plan) -> list[Tensor]:
        usable = zip(self.batch.grads, plan.finite.tolist(), strict=True)
        new = [torch.empty_like(grad) if finite else torch.zeros_like(grad) for grad, finite in usable]
        tables = _addresses(new)[0], *self.grads[:2], _rows(plan.by)
        self._share_out(self.kernels.rescale, self._chunks_of(plan.finite), *tables)
        return new

    def _chunks_of(self, finite: Tensor) -> Any:
        return np.flatnonzero(finite.numpy()[self.owners])

    def _copy_trackers(self, names: tuple[str, ...], vectors: Any, back: bool) -> None:
        states = self.batch.states
        addresses = _addresses(*([state.get(name, state["adopted_at"]) for state in states] for name in names))
        narrow = [name in _COUNTERS for name in names]
        for rows, dtype in ((narrow, torch.float32), (np.logical_not(narrow), self.precise)):
            chosen = vectors[rows]
            self.kernels.copy_numbers(addresses[rows], _like(dtype), chosen, back)
            vectors[rows] = chosen

    def _share_out(self, kernel: Any, chunks: Any, *arguments: Any) -> None:
        """Call a kernel on chunks, on as many threads as PyTorch takes."""
        threads = max(1, min(torch.get_num_threads(), len(chunks) // SHORT))
        own, *others = (chunks[len(chunks) * n // threads : len(chunks) * (n + 1) // threads] for n in range(threads))
        waiting = [_pool(threads, os.getpid()).submit(kernel, share, self.table, *arguments) for share in others]
        kernel(own, self.table, *arguments)
        for other in waiting:
            other.result()


def _addresses(*columns: list[Tensor]) -> Any:
    return np.array([[tensor.data_ptr() for tensor in column] for column in columns])


def _rows(by: Coefficients) -> Any:
    return torch.stack(by, dim=1).numpy()


@cache
def _like(dtype: torch.dtype, bits: bool = False) -> Any:
    """An empty array that tells a kernel how entries of this dtype are stored, or their bits."""
    return np.empty(0, (_BITS if bits else _STORED)[dtype])


@cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads of this process: a forked one has none of its parent's."""
    return ThreadPoolExecutor(threads, "stable_spam")


@cache
def can_run(param: torch.dtype, grad: torch.dtype, moment: torch.dtype, rescales: bool) -> bool:
    """Whether the kernels take these dtypes, and can be compiled and run; if that fails, one warning says why."""
    dtypes = {param, grad, moment}
    if not dtypes <= set(_STORED) or (torch.float64 in dtypes and len(dtypes) > 1) or (kernels := load()) is None:
        return False
    try:
        _try(param, grad, moment, rescales)
    except Exception as error:  # of any kind: a compiler and files on disk have many ways to fail
        for kernel in kernels.KERNELS:  # from now on, without compiled code on disk
            kernel._cache = import_module("numba.core.caching").NullCache()
        try:
            _try(param, grad, moment, rescales)
        except Exception:
            _warn_slower(f"Numba cannot compile or run here: {error!r:.200}")
            return False
        why = f"Numba's cache of compiled code cannot be used, so each process compiles anew: {error!r:.200}"
        warnings.warn(f"{why}; only the first step is slower", stacklevel=2)
    return True


@cache
def load() -> ModuleType | None:
    """`hf_stablespam.optim.backends.numba_kernels`, or ``None`` (after one warning) where Numba cannot be used."""
    if find_spec("numba") is None:
        _warn_slower("numba is not installed; install it with: pip install 'hf_stablespam[cpu]'")
        return None
    try:
        if import_module("numba").config.DISABLE_JIT:
            _warn_slower("NUMBA_DISABLE_JIT is set; unset it")
            return None
        return import_module("hf_stablespam.optim.backends.numba_kernels")
    except Exception as error:  # it does not fit the NumPy beside it, or Python
        _warn_slower(f"numba is installed but cannot be used: {error!r:.200}")
        return None


def _warn_slower(why: str) -> None:
    warnings.warn(f"{why}. Until then steps on the CPU are slower (PyTorch's operations serve).", stacklevel=2)


def _try(param: torch.dtype, grad: torch.dtype, moment: torch.dtype, rescales: bool) -> None:
    """Run the kernels once on a tensor of few entries, which compiles them for these dtypes."""
    precise = torch.promote_types(grad, torch.float32)
    state = {name: torch.zeros((), dtype=torch.float32 if name in _COUNTERS else precise) for name in Trackers._fields}
    state |= {name: torch.zeros(8, dtype=moment) for name in MOMENTS if not rescales}
    batch = Batch([torch.ones(8, dtype=param)], [torch.ones(8, dtype=grad)], [state])
    ones = torch.ones(1, dtype=precise)
    one = NumbaOps(batch, {"stochastic_rounding": False})
    one.write_trackers(torch.stack(one.read_trackers()[:5]))
    one.measure_clipped(one.measure(), Clipping(ones, ones, ones))
    plan = Plan(ones, ones > 0, ones, ones > 0, Coefficients(*[ones] * 10))
    (one.rescale if rescales else one.update)(plan)
