"""The passes in machine code that Numba makes (extra ``cpu``): one call per thread for all tensors of a step.

The kernels find tensors by their addresses. Each thread has a share of all chunks of 16,384 entries, whose tensors may
be long or short. bfloat16 is read and written through its bits, as uint16. The threads are Python's (see `numba_ops`),
which the kernels let run: Numba's own compile for twice as long, change how many threads PyTorch takes where both use
OpenMP, and end a process that was forked.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic, overload
from numpy import ndarray as Array

CHUNK = 1 << 14  # entries: 64 KiB of float32, so that the second look at a chunk finds it in the cache
TINY = 1e-15  # entries whose squares may leave the range of float32
# `arcp` lets a division by one number become a multiplication; nan and inf stay what they are
_FAST = {"reassoc", "contract", "arcp", "nsz"}
KERNELS: list[Any] = []


def _compiled(**options: Any) -> Callable[[Any], Any]:
    """`numba.njit` that keeps what it has compiled for the next process, where there is a folder to keep it in."""

    def decorate(function: Any) -> Any:
        try:
            kernel = njit(cache=True, nogil=True, error_model="numpy", **options)(function)
        except RuntimeError:  # no such folder
            kernel = njit(nogil=True, error_model="numpy", **options)(function)
        KERNELS.append(kernel)
        return kernel

    return decorate


def _to_pointer(context: Any, address: Any, like: Any) -> Any:
    """A pointer to numbers of the dtype of ``like``, from an address."""
    result = types.CPointer(like.dtype)

    def generate(target: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.inttoptr(values[0], target.get_value_type(result))

    return result(types.int64, like), generate


_pointer: Any = intrinsic(_to_pointer)


def _same_bits(source: Any, result: Any) -> Any:
    """An intrinsic that takes the bits of one number for those of another type."""

    @intrinsic
    def cast(context: Any, value: Any) -> Any:
        def generate(target: Any, builder: Any, signature: Any, values: Any) -> Any:
            return builder.bitcast(values[0], target.get_value_type(result))

        return result(source), generate

    return cast


_float32_of = _same_bits(types.uint32, types.float32)
_float64_of = _same_bits(types.uint64, types.float64)
_bits_of = _same_bits(types.float32, types.uint32)


def widen(value: Any) -> Any:
    """A number as it is stored (bfloat16: its bits) as one to calculate with."""
    raise NotImplementedError


@overload(widen, strict=False)
def _widen(value: Any) -> Any:
    if isinstance(value, types.Float):
        return lambda value: value
    return lambda value: _float32_of(np.uint32(np.uint32(value) << np.uint32(16)))


def narrow(value: Any, like: Any, noise: Any) -> Any:
    """A number as it is stored in an array: for bfloat16 the upper bits after ``noise`` was added to the lower ones."""
    raise NotImplementedError


@overload(narrow, strict=False)
def _narrow(value: Any, like: Any, noise: Any) -> Any:
    if isinstance(like.dtype, types.Float):
        return lambda value, like, noise: value

    def to_bfloat16(value: Any, like: Any, noise: Any) -> Any:
        bits = _bits_of(value)
        if bits & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000):
            return np.uint16(0x7FC0)  # nan
        if bits & np.uint32(0x7F800000) == np.uint32(0x7F800000):
            return np.uint16(bits >> np.uint32(16))  # infinite
        return np.uint16(np.uint32(bits + noise) >> np.uint32(16))

    return to_bfloat16


def to_nearest(value: Any, like: Any) -> Any:
    """The noise that rounds to the nearest bfloat16, to the even one of two."""
    raise NotImplementedError


@overload(to_nearest, strict=False)
def _to_nearest(value: Any, like: Any) -> Any:
    if isinstance(like.dtype, types.Float):
        return lambda value, like: np.uint32(0)
    return lambda value, like: np.uint32(0x7FFF) + ((_bits_of(value) >> np.uint32(16)) & np.uint32(1))


def of_bits(value: Any, like: Any) -> Any:
    """The number that has these bits, in the dtype of ``like``."""
    raise NotImplementedError


@overload(of_bits, strict=False)
def _of_bits(value: Any, like: Any) -> Any:
    if like.dtype == types.float64:
        return lambda value, like: _float64_of(np.uint64(value))
    if value.bitwidth == 32:
        return lambda value, like: _float32_of(np.uint32(value))
    return lambda value, like: widen(np.uint16(value))


@_compiled()
def _scrambled(bits: Any) -> Any:
    """Bits that look random: the last steps of MurmurHash3."""
    bits = np.uint32((bits ^ (bits >> np.uint32(16))) * np.uint32(0x85EBCA6B))
    bits = np.uint32((bits ^ (bits >> np.uint32(13))) * np.uint32(0xC2B2AE35))
    return np.uint32(bits ^ (bits >> np.uint32(16)))


@_compiled()
def _largest(bits: Array) -> Any:
    """The bits of the largest number, signs left out: without them they are in the order of the numbers, nan on top."""
    whole = bits.dtype.type
    without_sign = whole(np.iinfo(bits.dtype).max)
    largest = whole(0)
    for index in range(bits.size):
        largest = max(largest, whole(bits[index] & without_sign))
    return largest


@_compiled(fastmath=_FAST)
def _square(values: Array, zero: Any) -> Any:
    total = zero
    for index in range(values.size):
        value = widen(values[index])
        total += value * value
    return total


@_compiled(fastmath=_FAST)
def _clipped_square(values: Array, threshold: Any, ratio: Any, zero: Any) -> Any:
    """Sum of squares after clipping, and how many entries were clipped."""
    total, entries = zero, 0
    for index in range(values.size):
        value = widen(values[index])
        is_spike = abs(value) > threshold
        value = value * ratio if is_spike else value
        entries += is_spike
        total += value * value
    return total, entries


@_compiled()
def _norm(values: Array, largest: Any, threshold: Any, ratio: Any, zero: Any) -> Any:
    """The norm of a chunk after clipping and the number of clipped entries."""
    if largest >= TINY or largest == 0:  # false for nan
        if not largest > threshold:
            return np.sqrt(np.float64(_square(values, zero))), 0
        total, entries = _clipped_square(values, threshold, ratio, zero)
        return np.sqrt(np.float64(total)), entries
    square, entries, scale = 0.0, 0, np.float64(largest)
    for index in range(values.size):
        value = widen(values[index])
        if abs(value) > threshold:
            value = value * ratio
            entries += 1
        square += (value / scale) ** 2
    return scale * np.sqrt(square), entries


class Table(NamedTuple):
    """Where the gradients are. A ``like`` is an empty array that tells a dtype."""

    grads: Array  # (tensors,) addresses
    sizes: Array  # (tensors,) entries
    first: Array  # (tensors,) the first chunk of each
    owners: Array  # (chunks,) the tensor of each chunk
    like: Array
    bits_like: Array  # signed integers of the same width
    itemsize: int


@_compiled()
def _range(table: Table, chunk: int) -> tuple[int, int, int]:
    """The tensor of a chunk, its first entry in it, and how many there are."""
    owner = table.owners[chunk]
    start = (chunk - table.first[owner]) * CHUNK
    return owner, start, min(CHUNK, table.sizes[owner] - start)


@_compiled()
def _measure(
    table: Table, chunk: int, threshold: Any, ratio: Any, again: bool, maxima: Array, norms: Array, entries: Array
) -> None:
    owner, start, size = _range(table, chunk)
    address = table.grads[owner] + start * table.itemsize
    if not again:
        maxima[chunk] = of_bits(_largest(carray(_pointer(address, table.bits_like), size)), maxima)
    values = carray(_pointer(address, table.like), size)
    norms[chunk], entries[chunk] = _norm(values, maxima[chunk], threshold, ratio, maxima.dtype.type(0))


@_compiled()
def measure(
    start: int,
    stop: int,
    table: Table,
    thresholds: Array,  # (tensors,)
    ratios: Array,
    again: bool,  # only the few chunks that hold a spike; the others keep what was found in them
    maxima: Array,  # (chunks,) of the dtype of the statistics
    norms: Array,  # (chunks,) float64
    entries: Array,  # (chunks,) int64
) -> None:
    """The largest |entry| of each chunk, and its norm and number of clipped entries after clipping."""
    for chunk in range(start, stop):
        owner = table.owners[chunk]
        if not again or maxima[chunk] > thresholds[owner]:
            _measure(table, chunk, thresholds[owner], ratios[owner], again, maxima, norms, entries)


@_compiled()
def of_tensors(table: Table, chunk_max: Array, chunk_norm: Array, chunk_entries: Array, found: Array) -> None:
    """Maxima, norms and counts of tensors, (3, tensors), from those of their chunks."""
    found[:] = 0
    for chunk in range(chunk_max.size):
        owner, value = table.owners[chunk], chunk_max[chunk]
        if value > found[0, owner] or value != value:
            found[0, owner] = value
        found[2, owner] += chunk_entries[chunk]
    squares = np.zeros(found.shape[1])
    for chunk in range(chunk_max.size):
        squares[table.owners[chunk]] += (chunk_norm[chunk] / _scale(found[0, table.owners[chunk]])) ** 2
    for owner in range(found.shape[1]):
        found[1, owner] = _scale(found[0, owner]) * np.sqrt(squares[owner])


@_compiled()
def _scale(largest: Any) -> float:
    return np.float64(largest) if 0 < largest < np.inf else 1.0


@_compiled(fastmath=_FAST)
def _update(
    param: Array, grad: Array, exp_avg: Array, exp_avg_sq: Array, by: Array, stochastic: bool, key: Any
) -> None:
    threshold, ratio, factor, keep, enter, keep_sq, enter_sq = by[0], by[1], by[2], by[3], by[4], by[5], by[6]
    size, decay, eps = by[7], by[8], by[9]
    for index in range(grad.size):
        value = widen(grad[index])
        value = (value * ratio if abs(value) > threshold else value) * factor
        first = keep * widen(exp_avg[index]) + enter * value
        second = keep_sq * widen(exp_avg_sq[index]) + enter_sq * value * value
        weight = widen(param[index]) * decay - size * first / (np.sqrt(second) + eps)
        noise = to_nearest(weight, param)
        if stochastic:
            noise = _scrambled(np.uint32(index) ^ key) & np.uint32(0xFFFF)
        param[index] = narrow(weight, param, noise)
        exp_avg[index] = narrow(first, exp_avg, to_nearest(first, exp_avg))
        exp_avg_sq[index] = narrow(second, exp_avg_sq, to_nearest(second, exp_avg_sq))


@_compiled()
def _update_chunk(
    table: Table,
    chunk: int,
    others: Array,
    likes: Any,
    sizes: Any,
    by: Array,
    stochastic: bool,
    key: Any,
) -> None:
    owner, start, size = _range(table, chunk)
    _update(
        carray(_pointer(others[0, owner] + start * sizes[0], likes[0]), size),
        carray(_pointer(table.grads[owner] + start * table.itemsize, table.like), size),
        carray(_pointer(others[1, owner] + start * sizes[1], likes[1]), size),
        carray(_pointer(others[2, owner] + start * sizes[1], likes[1]), size),
        *(by[owner], stochastic, key),
    )


@_compiled()
def update(
    start: int,  # the first chunk of this thread's share
    stop: int,
    table: Table,
    others: Array,  # (3, tensors): addresses of weights, M, V
    likes: tuple[Array, Array],  # of weights and moments
    itemsizes: tuple[int, int],
    finite: Array,  # (tensors,) bool: what is not is not touched
    by: Array,  # (tensors, 10), `formulas.Coefficients`
    stochastic: bool,
    seed: int,
) -> None:
    """Clip, normalise, reset and AdamW."""
    for chunk in range(start, stop):
        if finite[table.owners[chunk]]:
            key = _scrambled(np.uint32(chunk) ^ np.uint32(seed))
            _update_chunk(table, chunk, others, likes, itemsizes, by, stochastic, key)


@_compiled(fastmath=_FAST)
def _rescale(new: Array, grad: Array, threshold: Any, ratio: Any, factor: Any) -> None:
    for index in range(grad.size):
        value = widen(grad[index])
        value = (value * ratio if abs(value) > threshold else value) * factor
        new[index] = narrow(value, new, to_nearest(value, new))


@_compiled()
def _rescale_chunk(table: Table, chunk: int, new: Array, finite: Array, by: Array) -> None:
    owner, start, size = _range(table, chunk)
    target = carray(_pointer(new[owner] + start * table.itemsize, table.like), size)
    if finite[owner]:
        grad = carray(_pointer(table.grads[owner] + start * table.itemsize, table.like), size)
        _rescale(target, grad, by[owner, 0], by[owner, 1], by[owner, 2])
    else:
        target[:] = 0


@_compiled()
def rescale(start: int, stop: int, table: Table, new: Array, finite: Array, by: Array) -> None:
    """Clip and normalise into the memory at the addresses in ``new``; zeros for what is not finite."""
    for chunk in range(start, stop):
        _rescale_chunk(table, chunk, new, finite, by)


@_compiled()
def read_numbers(addresses: Array, vectors: Array) -> None:
    """Copy the numbers at the addresses (rows, tensors) into vectors of their dtype."""
    for row in range(addresses.shape[0]):
        for owner in range(addresses.shape[1]):
            vectors[row, owner] = carray(_pointer(addresses[row, owner], vectors), 1)[0]


@_compiled()
def write_numbers(addresses: Array, vectors: Array) -> None:
    """The other way round."""
    for row in range(addresses.shape[0]):
        for owner in range(addresses.shape[1]):
            carray(_pointer(addresses[row, owner], vectors), 1)[0] = vectors[row, owner]
