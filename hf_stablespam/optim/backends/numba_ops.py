"""The passes on the CPU by `numba_kernels`: where everything is, and where Numba cannot be used."""

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_stablespam.optim.backends.base import Backend, is_plain_tensor, share_layout
from hf_stablespam.optim.plan import CHANGING, MOMENTS, Batch, Clipped, Clipping, Measured, Options, Plan, Trackers

# how an array shows a tensor's entries, and their bits as signed integers
_STORED = {
    torch.float32: (np.float32, np.int32),
    torch.float64: (np.float64, np.int64),
    torch.bfloat16: (np.uint16, np.int16),
}
_COUNTERS = ("step", "moment_step", "adopted_at", "clip_since")  # float32 whatever the others are
SHORT = 8  # chunks that one thread has done before a second one begins


class NumbaOps(Backend):
    """Tables of addresses for `numba_kernels`."""

    def __init__(self, batch: Batch, options: Options) -> None:
        super().__init__(batch, options)
        kernels = load()
        assert kernels is not None
        self.kernels, grads = kernels, batch.grads
        sizes = np.array([grad.numel() for grad in grads])
        counts = -(-sizes // kernels.CHUNK)
        self.table = kernels.Table(
            *(_addresses(grads), sizes, counts.cumsum() - counts, np.repeat(np.arange(len(grads)), counts)),
            *(*_likes(grads[0].dtype), grads[0].element_size()),
        )
        self.dtype = _STORED[self.precise][0]
        chunks = len(self.table.owners)
        self.maxima, self.norms, self.entries = (np.empty(chunks, kind) for kind in (self.dtype, float, np.int64))

    def read_trackers(self) -> Trackers:
        states = self.batch.states
        found: dict[str, Tensor] = {}
        for names, dtype in self._trackers():
            columns = [[state.get(name, state["adopted_at"]) for state in states] for name in names]
            vectors = np.empty((len(names), len(states)), dtype)
            self.kernels.read_numbers(np.array([_addresses(column) for column in columns]), vectors)
            found.update(zip(names, torch.from_numpy(vectors).unbind(), strict=True))
        return Trackers(**found)

    def write_trackers(self, trackers: Trackers) -> None:
        for names, _ in self._trackers():
            names = [name for name in names if name in CHANGING]
            addresses = np.array([_addresses([state[name] for state in self.batch.states]) for name in names])
            vectors = torch.stack([getattr(trackers, name) for name in names])
            self.kernels.write_numbers(addresses, vectors.numpy())

    def measure(self) -> Measured:
        nowhere = np.full(len(self.table.sizes), np.inf, self.dtype)
        self._share_out(
            self.kernels.measure, self.table, nowhere, nowhere, False, self.maxima, self.norms, self.entries
        )
        return Measured(*self._of_tensors()[:2])

    def measure_clipped(self, measured: Measured, clipping: Clipping) -> Clipped:
        if not self.clips:
            return self.unclipped(measured)
        limits = clipping.threshold.numpy(), clipping.ratio.numpy()
        self._share_out(self.kernels.measure, self.table, *limits, True, self.maxima, self.norms, self.entries)
        return Clipped(*self._of_tensors()[1:])

    def update(self, plan: Plan) -> None:
        params, moments = self.batch.params, [[state[name] for state in self.batch.states] for name in MOMENTS]
        dtypes = params[0].dtype, moments[0][0].dtype
        stochastic = self.options["stochastic_rounding"] and dtypes[0] == torch.bfloat16
        by = torch.stack(plan.by, dim=1).numpy()
        self._share_out(
            *(self.kernels.update, self.table, np.array([_addresses(column) for column in (params, *moments)])),
            *(tuple(_likes(dtype)[0] for dtype in dtypes), tuple(dtype.itemsize for dtype in dtypes)),
            *(plan.finite.numpy(), by, stochastic),
            int(torch.randint(1 << 32, ())) if stochastic else 0,
        )
        torch.autograd.graph.increment_version(params)  # as torch's own operations do, so that autograd notices

    def rescale(self, plan: Plan) -> list[Tensor]:
        new = [torch.empty_like(grad) for grad in self.batch.grads]
        by = torch.stack(plan.by[:3], dim=1).numpy()
        self._share_out(self.kernels.rescale, self.table, _addresses(new), plan.finite.numpy(), by)
        return new

    def _trackers(self) -> list[tuple[list[str], Any]]:
        """Names of the trackers by their dtype."""
        others = [name for name in Trackers._fields if name not in _COUNTERS]
        return [(list(_COUNTERS), np.float32), (others, _STORED[self.precise][0])]

    def _share_out(self, kernel: Any, *arguments: Any) -> None:
        """Call a kernel on all chunks, on as many threads as PyTorch takes."""
        chunks = len(self.table.owners)
        threads = max(1, min(torch.get_num_threads(), chunks // SHORT))
        own, *others = pairwise(chunks * share // threads for share in range(threads + 1))
        waiting = [_pool(threads, os.getpid()).submit(kernel, *share, *arguments) for share in others]
        kernel(*own, *arguments)
        for other in waiting:
            other.result()

    def _of_tensors(self) -> tuple[Tensor, ...]:
        """Maximum, norm and clipped entries of each tensor."""
        found = np.empty((3, len(self.table.sizes)), self.dtype)
        self.kernels.of_tensors(self.table, self.maxima, self.norms, self.entries, found)
        return torch.from_numpy(found).unbind()


def takes(tensors: list[Tensor], rescales: bool) -> bool:
    """Whether the kernels can update these tensors (weight, gradient, moments) or rescale them, in this process."""
    if not (is_plain_tensor(*tensors) and all(tensor.is_cpu and tensor.dtype in _STORED for tensor in tensors)):
        return False
    dtypes = tuple(tensor.dtype for tensor in tensors)
    wide = {dtype == torch.float64 for dtype in dtypes}
    return len(wide) == 1 and share_layout(tensors) and can_run(*dtypes[:3], rescales)


@cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads of this process: a forked one has none of its parent's."""
    return ThreadPoolExecutor(threads, "stable_spam")


@cache
def can_run(param: torch.dtype, grad: torch.dtype, moment: torch.dtype, rescales: bool) -> bool:
    """Whether the kernels for these dtypes can be compiled and run; if not, one warning says why."""
    kernels = load()
    if kernels is None:
        return False
    try:
        _try(param, grad, moment, rescales)
    except Exception as error:  # of any kind: a compiler and files on disk have many ways to fail
        _forget_cache(kernels)
        try:
            _try(param, grad, moment, rescales)
        except Exception:
            _warn(f"Numba cannot compile or run here: {_short(error)}")
            return False
        _warn(
            f"Numba's cache of compiled code cannot be used, so each process compiles anew: {_short(error)}",
            slower=False,
        )
    return True


@cache
def load() -> ModuleType | None:
    """`hf_stablespam.optim.backends.numba_kernels`, or ``None`` (after one warning) where Numba cannot be used."""
    if find_spec("numba") is None:
        _warn("numba is not installed; install it with: pip install 'hf_stablespam[cpu]'")
        return None
    try:
        config: Any = import_module("numba").config

        if config.DISABLE_JIT:
            _warn("NUMBA_DISABLE_JIT is set; unset it")
            return None
        from hf_stablespam.optim.backends import numba_kernels
    except Exception as error:  # it does not fit the NumPy beside it, or Python
        _warn(f"numba is installed but cannot be used: {_short(error)}")
        return None
    return numba_kernels


def _warn(why: str, slower: bool = True) -> None:
    effect = "steps on the CPU are slower (PyTorch's operations serve)" if slower else "only the first step is slower"
    warnings.warn(f"{why}. Until then {effect}." if slower else f"{why}; {effect}", stacklevel=2)


def _short(error: Exception) -> str:
    return repr(error)[:200]


def _try(param: torch.dtype, grad: torch.dtype, moment: torch.dtype, rescales: bool) -> None:
    """Run the kernels once on a tensor of few entries, which compiles them for these dtypes."""
    precise = torch.promote_types(grad, torch.float32)
    counters = {name: torch.zeros(()) for name in _COUNTERS}
    trackers = {name: torch.zeros((), dtype=precise) for name in Trackers._fields if name not in _COUNTERS}
    moments = {name: torch.zeros(8, dtype=moment) for name in ("exp_avg", "exp_avg_sq")}
    batch = Batch([torch.ones(8, dtype=param)], [torch.ones(8, dtype=grad)], [counters | trackers | moments])
    ones = torch.ones(1, dtype=precise)
    plan = Plan(None, ones > 0, ones, ones > 0, [ones] * 10)  # type: ignore[arg-type]
    one = NumbaOps(batch, {"clip_beta": 0.9, "stochastic_rounding": False})
    one.write_trackers(one.read_trackers())
    one.measure_clipped(one.measure(), Clipping(ones, ones, ones))
    if rescales:
        one.rescale(plan)
    else:
        one.update(plan)


def _forget_cache(kernels: ModuleType) -> None:
    """From now on compile without reading or writing compiled code on disk."""
    from numba.core.caching import NullCache

    for kernel in kernels.KERNELS:
        kernel._cache = NullCache()


def _addresses(tensors: list[Tensor]) -> Any:
    return np.array([tensor.data_ptr() for tensor in tensors])


@cache
def _likes(dtype: torch.dtype) -> tuple[Any, Any]:
    """Empty arrays that tell a kernel the dtype of a tensor, and of its bits."""
    numbers, bits = _STORED[dtype]
    return np.empty(0, numbers), np.empty(0, bits)
