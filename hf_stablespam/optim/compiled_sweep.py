"""A gradient read once on the CPU, and its spikes found, in machine code that Numba makes (extra ``cpu``).

PyTorch has no operation that gives norm and maximum together: `cpu_sweep` reads a gradient twice with it, and a third
time to find the spikes.
"""

import os
from collections.abc import Callable
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit, prange
from numpy import ndarray as Array
from torch import Tensor

BLOCK = 1 << 10  # entries that share one maximum
SHORT = 1 << 16  # entries that one thread has read before a second one begins
# Numba's threads end the process if two threads of Python call them at once, or a process that was forked does.
_one_at_a_time = Lock()
_own_process = os.getpid()


class Reading(NamedTuple):
    """What one read of a vector found."""

    grad_max: float  # the largest |entry|; nan if any is
    square: float  # sum of squares: in the vector's dtype within a block, in float64 over the blocks
    maxima: Array  # (blocks,) the largest |entry| of each block of 1024; the last block may be smaller


def read(values: Tensor) -> Reading:
    """Measure a vector.

    Args:
        values: float32 or float64, contiguous, not empty.
    """
    array = values.detach().numpy()
    maxima = np.empty(-(-array.size // BLOCK), array.dtype)
    whole = np.int32 if array.dtype == np.float32 else np.int64
    arrays = array, array.view(whole), maxima, maxima.view(whole)
    threads = torch.get_num_threads()
    if threads == 1 or array.size < SHORT or os.getpid() != _own_process:
        grad_max, square = _read(*arrays)
    else:
        with _one_at_a_time:
            grad_max, square = _read_in_parallel(*arrays, threads)
    return Reading(grad_max, square, maxima)


def find(values: Tensor, maxima: Array, threshold: float, limit: int) -> list[int]:
    """The places of the entries whose size is above a threshold: all of them, or the first ``limit``.

    Args:
        values: the vector that was read.
        maxima: from `read`.
        threshold: ``T̂``, a number of the vector's dtype.
        limit: how many are enough.
    """
    places = np.empty(limit, np.int64)
    found = _find(values.detach().numpy(), maxima, maxima.dtype.type(threshold), places)
    return places[:found].tolist()


def _compiled(**options: Any) -> Callable[[Any], Any]:
    """`numba.njit` that keeps what it has compiled for the next process, where there is a folder to keep it in."""

    def decorate(function: Any) -> Any:
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # no such folder
            return njit(**options)(function)

    return decorate


@_compiled(fastmath={"reassoc", "contract"})
def _sum_of_squares(values: Array) -> Any:
    total = values.dtype.type(0)
    for index in range(values.size):
        total += values[index] * values[index]
    return total


@_compiled()
def _largest(bits: Array) -> Any:
    """The bits of the largest number, signs left out: without them they are in the order of the numbers, nan on top."""
    whole = bits.dtype.type
    without_sign = whole(np.iinfo(bits.dtype).max)
    largest = whole(0)
    for index in range(bits.size):
        largest = max(largest, whole(bits[index] & without_sign))
    return largest


@_compiled(nogil=True)
def _read_share(values: Array, bits: Array, maxima: Array, share: int, shares: int) -> float:
    """Write one share of the bits of the blocks' maxima; return its sum of squares."""
    total = 0.0
    for block in range(share * maxima.size // shares, (share + 1) * maxima.size // shares):
        start, stop = block * BLOCK, min((block + 1) * BLOCK, values.size)
        maxima[block] = _largest(bits[start:stop])
        total += _sum_of_squares(values[start:stop])
    return total


@_compiled(nogil=True)
def _read(values: Array, bits: Array, maxima: Array, maxima_bits: Array) -> tuple[float, float]:
    total = _read_share(values, bits, maxima_bits, 0, 1)
    return maxima[maxima_bits.argmax()], total


@_compiled(nogil=True, parallel=True)
def _read_in_parallel(
    values: Array, bits: Array, maxima: Array, maxima_bits: Array, threads: int
) -> tuple[float, float]:
    total = 0.0
    for thread in prange(threads):
        total += _read_share(values, bits, maxima_bits, thread, threads)
    return maxima[maxima_bits.argmax()], total


@_compiled(nogil=True)
def _find(values: Array, maxima: Array, threshold: float, places: Array) -> int:
    found = 0
    for block in range(maxima.size):
        if maxima[block] > threshold:
            for place in range(block * BLOCK, min((block + 1) * BLOCK, values.size)):
                if abs(values[place]) > threshold:
                    places[found] = place
                    found += 1
                    if found == places.size:
                        return found
    return found
