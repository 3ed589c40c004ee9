"""The passes in machine code that Numba makes (extra ``cpu``): one call per thread for all tensors of a step.

The kernels find tensors by their addresses. Each thread gets a list of chunks of 4,096 entries, whose tensors may be
long or short. bfloat16 is read and written through its bits, as uint16. The threads are Python's (see `numba_ops`),
which the kernels let run: Numba's own compile for twice as long, change how many threads PyTorch takes where both use
OpenMP, and end a process that was forked. A ``like`` is an empty array that tells a kernel a dtype.
"""

from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic, overload
from numpy import ndarray as Array

CHUNK = 1 << 12  # entries
TINY = 1e-28  # sums of squares, of which some may have left the range of float32
NEAREST = np.int32(-1)  # the noise that rounds to the nearest bfloat16, to the even one of two
KERNELS: list[Any] = []


def _compiled(function: Any, **options: Any) -> Any:
    """`numba.njit` that keeps what it has compiled for the next process, where there is a folder to keep it in."""
    options |= {"nogil": True, "error_model": "numpy"}
    try:
        kernel = njit(cache=True, **options)(function)
    except RuntimeError:  # no such folder
        kernel = njit(**options)(function)
    KERNELS.append(kernel)
    return kernel


# `arcp` lets a division by one number become a multiplication; nan and inf stay what they are
_fast = partial(_compiled, fastmath={"reassoc", "contract", "arcp", "nsz"})


def _to_pointer(context: Any, address: Any, like: Any) -> Any:
    """A pointer to numbers of the dtype of ``like``, from an address."""
    result = types.CPointer(like.dtype)

    def generate(target: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.inttoptr(values[0], target.get_value_type(result))

    return result(types.int64, like), generate


def _same_bits(source: Any, result: Any) -> Any:
    """An intrinsic that takes the bits of one number for those of another type."""

    @intrinsic
    def cast(context: Any, value: Any) -> Any:
        def generate(target: Any, builder: Any, signature: Any, values: Any) -> Any:
            return builder.bitcast(values[0], target.get_value_type(result))

        return result(source), generate

    return cast


_pointer: Any = intrinsic(_to_pointer)
_float32_of, _bits_of = _same_bits(types.uint32, types.float32), _same_bits(types.float32, types.uint32)


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
        bits = _bits_of(value)  # the lower ones of an infinite number are zero, and stay alone
        to_even = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        upper = np.uint16((bits + (to_even if noise < 0 else np.uint32(noise))) >> np.uint32(16))
        return upper if value == value else np.uint16(0x7FC0)

    return to_bfloat16


@_compiled
def _scrambled(bits: Any) -> Any:
    """A number whose bits depend on all bits of another one (the last step of MurmurHash3)."""
    bits = np.uint32((bits ^ (bits >> np.uint32(16))) * np.uint32(0x85EBCA6B))
    bits = np.uint32((bits ^ (bits >> np.uint32(13))) * np.uint32(0xC2B2AE35))
    return np.uint32(bits ^ (bits >> np.uint32(16)))


class Table(NamedTuple):
    """How tensors are cut into chunks."""

    sizes: Array  # (tensors,) entries
    first: Array  # (tensors,) the first chunk of each
    owners: Array  # (chunks,) the tensor of each chunk


@_compiled
def _entries(table: Table, chunk: int, addresses: Array, like: Array) -> Array:
    """The entries of a chunk; there is one address per tensor."""
    owner = table.owners[chunk]
    start = (chunk - table.first[owner]) * CHUNK
    return carray(_pointer(addresses[owner] + start * like.itemsize, like), min(CHUNK, table.sizes[owner] - start))


@_compiled
def _largest(bits: Array) -> Any:
    """The bits of the largest number, signs left out: without them they are in the order of the numbers, nan on top."""
    whole = bits.dtype.type
    largest = whole(0)
    for index in range(bits.size):
        largest = max(largest, whole(bits[index] & whole(np.iinfo(bits.dtype).max)))
    return largest


@_fast
def _square(values: Array, zero: Any) -> Any:
    """Sum of squares in the dtype of ``zero``."""
    square = zero
    for index in range(values.size):
        value = zero + widen(values[index])
        square += value * value
    return square


@_fast
def _clipped_square(values: Array, threshold: Any, ratio: Any, zero: Any) -> Any:
    """The same after clipping, and how many entries were clipped."""
    square, entries = zero, 0
    for index in range(values.size):
        value = zero + widen(values[index])
        is_spike = abs(value) > threshold
        value = value * ratio if is_spike else value
        entries += is_spike
        square += value * value
    return square, entries


@_compiled
def measure(chunks: Array, table: Table, grads: Array, like: Array, zero: Any, bits: Array, maxima: Array, sums: Array):
    """The largest |entry| (its bits; ``bits`` is like those of an entry) and the sum of squares of each chunk."""
    shift = 8 * (maxima.itemsize - bits.itemsize)
    for chunk in chunks:
        largest = _largest(_entries(table, chunk, grads, bits))
        maxima[chunk] = maxima.dtype.type(largest) << shift
        values = _entries(table, chunk, grads, like)
        sums[chunk] = _square(values, zero)
        if largest > 0 and not sums[chunk] > TINY:
            sums[chunk] = _square(values, np.float64(0))


@_compiled
def measure_clipped(
    chunks: Array, table: Table, grads: Array, like: Array, zero: Any, limits: Any, sums: Array, entries: Array
) -> None:
    """The same after clipping for chunks that hold a spike, and how many; limits are T̂ and T̂/gmax of tensors."""
    thresholds, ratios = limits
    for chunk in chunks:
        owner, values = table.owners[chunk], _entries(table, chunk, grads, like)
        sums[chunk], entries[chunk] = _clipped_square(values, thresholds[owner], ratios[owner], zero)
        if not sums[chunk] > TINY:
            sums[chunk] = _clipped_square(values, thresholds[owner], ratios[owner], np.float64(0))[0]


@_fast
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
        noise = np.int32(_scrambled(np.uint32(index) ^ key) & np.uint32(0xFFFF)) if stochastic else NEAREST
        param[index] = narrow(weight, param, noise)
        exp_avg[index] = narrow(first, exp_avg, NEAREST)
        exp_avg_sq[index] = narrow(second, exp_avg_sq, NEAREST)


@_compiled
def update(chunks: Array, table: Table, addresses: Array, likes: Any, by: Array, stochastic: bool, seed: int) -> None:
    """Clip, normalise, reset and AdamW, by the `Coefficients` of tensors (tensors, 10).

    There are addresses of weights, gradients, M and V, (4, tensors), and a ``like`` of weights, gradients and moments.
    """
    for chunk in chunks:
        _update(
            _entries(table, chunk, addresses[0], likes[0]),
            _entries(table, chunk, addresses[1], likes[1]),
            _entries(table, chunk, addresses[2], likes[2]),
            _entries(table, chunk, addresses[3], likes[2]),
            *(by[table.owners[chunk]], stochastic, _scrambled(np.uint32(chunk) ^ np.uint32(seed))),
        )


@_fast
def _rescale(new: Array, grad: Array, by: Array) -> None:
    threshold, ratio, factor = by[0], by[1], by[2]
    for index in range(grad.size):
        value = widen(grad[index])
        value = (value * ratio if abs(value) > threshold else value) * factor
        new[index] = narrow(value, new, NEAREST)


@_compiled
def rescale(chunks: Array, table: Table, new: Array, grads: Array, like: Array, by: Array) -> None:
    """Clip and normalise into the memory at the addresses in ``new``."""
    for chunk in chunks:
        _rescale(_entries(table, chunk, new, like), _entries(table, chunk, grads, like), by[table.owners[chunk]])


@_compiled
def copy_numbers(addresses: Array, like: Array, vectors: Array, back: bool) -> None:
    """Copy the numbers at addresses (rows, tensors) into vectors, or back."""
    for row in range(addresses.shape[0]):
        for owner in range(addresses.shape[1]):
            number = carray(_pointer(addresses[row, owner], like), 1)
            if back:
                number[0] = vectors[row, owner]
            else:
                vectors[row, owner] = number[0]
