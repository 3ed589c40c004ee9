"""The passes on the CPU by `numba_kernels`: where everything is, and where Numba cannot be used."""

import warnings
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_stablespam.optim.backends.base import Backend
from hf_stablespam.optim.backends.threads import call_on
from hf_stablespam.optim.formulas import Coefficients
from hf_stablespam.optim.plan import MOMENTS, Batch, Clipped, Clipping, Measured, Options, Plan, Trackers

# how an array shows a tensor's entries
_STORED = {torch.float32: np.float32, torch.float64: np.float64, torch.bfloat16: np.uint16}
_COUNTERS = ("step", "moment_step", "adopted_at", "clip_since")  # float32 whatever the others are
SHORT = 8  # chunks that one thread has done before the others have begun


class NumbaOps(Backend):
    """Tables of addresses for `numba_kernels`."""

    label = "Numba's kernels"

    def __init__(self, batch: Batch, options: Options) -> None:
        super().__init__(batch, options)
        kernels = load()
        assert kernels is not None
        moments = [[state[name] for state in batch.states] for name in MOMENTS if name in batch.states[0]]
        columns = [batch.params, batch.grads, *moments]
        self.kernels, self.addresses, self.likes = (
            kernels,
            _addresses(columns),
            [_like(one[0].dtype) for one in columns],
        )
        self.grads = self.addresses[1], self.likes[1]
        self.sizes = sizes = np.fromiter(map(Tensor.numel, batch.grads), np.int64, len(batch.grads))
        counts = np.maximum(-(-sizes // kernels.CHUNK), 1)  # one without entries for a tensor without entries
        self.first, self.owners = counts.cumsum() - counts, np.repeat(np.arange(len(sizes)), counts)
        shape = len(self.owners), kernels.STRIPS
        self.maxima, self.norms = np.empty(shape, _STORED[self.precise]), np.empty(shape)

    def read_trackers(self) -> Trackers:
        states = self.batch.states
        self.trackers = _addresses([[s.get(name, s["adopted_at"]) for s in states] for name in Trackers._fields])
        vectors = np.empty(self.trackers.shape, _STORED[self.precise])
        self._copy_trackers(vectors, back=False)
        return Trackers(*torch.from_numpy(vectors))

    def write_trackers(self, trackers: Tensor) -> None:
        self._copy_trackers(trackers.numpy(), back=True)

    def _copy_trackers(self, vectors: Any, back: bool) -> None:
        for name, addresses, vector in zip(Trackers._fields, self.trackers, vectors, strict=False):
            like = _like(torch.float32 if name in _COUNTERS else self.precise)
            self.kernels.copy_numbers(addresses, like, vector, back)

    def measure(self) -> Measured:
        bits = self.maxima.view(np.int64 if self.precise == torch.float64 else np.int32)
        self._launch(self.kernels.measure, np.arange(len(self.owners)), *self.grads, bits, self.norms)
        return Measured(self._of_tensors(np.maximum, self.maxima), self._of_tensors(np.hypot, self.norms))

    def measure_clipped(self, measured: Measured, clipping: Clipping) -> Clipped:
        limits, entries = (clipping.threshold.numpy(), clipping.ratio.numpy()), np.zeros(self.norms.shape)
        spiky = np.flatnonzero(self.maxima > limits[0][self.owners, None])  # the other strips keep what they have
        self._launch(self.kernels.measure_clipped, spiky, *self.grads, limits, self.norms, entries)
        return Clipped(self._of_tensors(np.hypot, self.norms), self._of_tensors(np.add, entries))

    def _of_tensors(self, reduce: Any, strips: Any) -> Tensor:
        """One number per tensor, from those of its strips."""
        return torch.from_numpy(reduce.reduceat(strips.ravel(), self.first * strips.shape[1])).to(self.precise)

    def update(self, plan: Plan) -> None:
        stochastic = self.options["stochastic_rounding"] and self.batch.params[0].dtype == torch.bfloat16
        seed = int(torch.randint(1 << 32, ())) if stochastic else 0
        tables = self.addresses, tuple(self.likes[:3]), _rows(plan.by)
        self._launch(self.kernels.update, self._usable_chunks(plan), *tables, stochastic, seed)
        torch.autograd.graph.increment_version(self.batch.params)  # as torch's own operations do: autograd notices

    def rescale(self, plan: Plan) -> list[Tensor]:
        new = self.kept_memory(plan)
        self._launch(self.kernels.rescale, self._usable_chunks(plan), _addresses([new])[0], *self.grads, _rows(plan.by))
        return new

    def _usable_chunks(self, plan: Plan) -> Any:
        """Those of finite gradients, the last first: of what was just measured the end is still in the cache."""
        return np.flatnonzero(plan.finite.numpy()[self.owners])[::-1].copy()

    def _launch(self, kernel: Any, chunks: Any, *arguments: Any) -> None:
        """Call a kernel for chunks, on as many threads as PyTorch takes."""
        work = self.kernels.Work(np.zeros(1, np.int64), chunks, self.sizes, self.first, self.owners)
        threads = torch.get_num_threads() if len(chunks) > SHORT else 1
        call_on(threads, lambda: work.taken[0] < len(chunks) and kernel(work, *arguments))


def _addresses(columns: list[list[Tensor]]) -> Any:
    return np.array([np.fromiter(map(Tensor.data_ptr, column), np.int64, len(column)) for column in columns])


def _rows(by: Coefficients) -> Any:
    return torch.stack(by, dim=1).numpy()


@cache
def _like(dtype: torch.dtype) -> Any:
    """An empty array that tells a kernel how entries of this dtype are stored."""
    return np.empty(0, _STORED[dtype])


@cache
def can_run(*dtypes: torch.dtype) -> bool:
    """Whether the kernels take weights, gradients and, unless they only rescale, moments of these dtypes.

    They are compiled and run here; if that fails, one warning says why.
    """
    mixed = torch.float64 in dtypes and len(set(dtypes)) > 1
    if mixed or not set(dtypes) <= set(_STORED) or (kernels := load()) is None:
        return False
    try:
        _try(*dtypes)
    except Exception as error:  # of any kind: a compiler and files on disk have many ways to fail
        for kernel in kernels.KERNELS:  # from now on, without compiled code on disk
            kernel._cache = import_module("numba.core.caching").NullCache()
        try:
            _try(*dtypes)
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


def _try(param: torch.dtype, grad: torch.dtype, moment: torch.dtype | None = None) -> None:
    """Run the kernels once on a tensor of few entries, which compiles them for these dtypes."""
    precise = torch.promote_types(grad, torch.float32)
    state = {name: torch.zeros((), dtype=torch.float32 if name in _COUNTERS else precise) for name in Trackers._fields}
    state |= {name: torch.zeros(8, dtype=moment) for name in MOMENTS if moment}
    batch = Batch([torch.ones(8, dtype=param)], [torch.ones(8, dtype=grad)], [state])
    ones = torch.ones(1, dtype=precise)
    one = NumbaOps(batch, {"stochastic_rounding": False})
    one.write_trackers(torch.stack(one.read_trackers()[:5]))
    one.measure_clipped(one.measure(), Clipping(ones, ones, ones))
    plan = Plan(ones, ones > 0, ones, ones > 0, Coefficients(*[ones] * 10))
    (one.update if moment else one.rescale)(plan)
