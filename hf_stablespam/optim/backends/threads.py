"""Threads for the kernels: those that PyTorch's own operations run on, where they are GNU OpenMP's.

After an operation these threads wait for the next one for some milliseconds, and keep their cores busy with waiting.
Python's threads would have to share the cores with them; on them a kernel begins at once, as PyTorch's operations do.
"""

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch

_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_PROCESS = os.getpid()


def call_on(threads: int, function: Callable[[], None]) -> None:
    """Call a function, which lets Python's other threads run, on so many threads at once, this one among them."""
    if threads == 1:
        function()
    elif begin_parallel := _openmp(os.getpid()):
        errors: list[BaseException] = []
        begin_parallel(_FUNCTION(lambda _: _keep_error(function, errors)), None, threads, 0)
        if errors:
            raise errors[0]
    else:
        others = [_pool(threads, os.getpid()).submit(function) for _ in range(threads - 1)]
        function()
        for other in others:
            if not other.cancel():  # one that has not begun finds nothing left to do
                other.result()


def _keep_error(function: Callable[[], None], errors: list[BaseException]) -> None:
    try:
        function()
    except BaseException as error:  # there is nobody to raise it to
        errors.append(error)


@cache
def _openmp(process: int) -> Any:
    """What begins a parallel region of the OpenMP that came with PyTorch, or ``None``.

    In a forked process it would wait for its threads, which only the parent has.
    """
    library = next(Path(torch.__file__).parent.glob("lib/libgomp*.so*"), None)
    return ctypes.CDLL(str(library)).GOMP_parallel if library and process == _PROCESS else None


@cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads of this process: a forked one has none of its parent's."""
    return ThreadPoolExecutor(threads, "stable_spam")
