"""The passes in machine code that Numba makes (extra ``cpu``): one call per thread for all tensors of a step.

The kernels find tensors by their addresses. Every thread takes the next chunk of all tensors until none is left, so
that one that is late, or shares its core with somebody else's, does less. bfloat16 is read and written through its
bits, as uint16. The threads are those of `threads`, not Numba's own, which compile for twice as long, change how many
PyTorch takes where both use OpenMP, and end a process that was forked. A ``like`` is an empty array that tells a kernel
a dtype. All is in one file, because a kernel that Numba keeps on disk is compiled anew when the file with it changes,
and no other.
"""

from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic, overload
from numpy import ndarray as Array

CHUNK = 1 << 16  # entries that a thread takes at once
STRIPS = 4  # parts of a chunk, which are read side by side and measured apart
BLOCK = 1 << 12  # entries whose squares are added in their own dtype; sums of blocks are in float64
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


def _to_same_bits(context: Any, value: Any, like: Any) -> Any:
    """The bits of a number, taken for one of the type of another."""

    def generate(target: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.bitcast(values[0], target.get_value_type(like))

    return like(value, like), generate


def _to_old_value(context: Any, counter: Any, more: Any) -> Any:
    """Add to the first entry of an array, and return what it was; no two threads are told the same."""

    def generate(target: Any, builder: Any, signature: Any, values: Any) -> Any:
        array = target.make_array(counter)(target, builder, values[0])
        return builder.atomic_rmw("add", array.data, values[1], "monotonic")

    return counter.dtype(counter, counter.dtype), generate


_pointer: Any = intrinsic(_to_pointer)
_same_bits: Any = intrinsic(_to_same_bits)
_add: Any = intrinsic(_to_old_value)


def widen(value: Any) -> Any:
    """A number as it is stored (bfloat16: its bits) as one to calculate with."""
    raise NotImplementedError


@overload(widen, strict=False)
def _widen(value: Any) -> Any:
    if isinstance(value, types.Float):
        return lambda value: value
    return lambda value: _same_bits(np.uint32(np.uint32(value) << np.uint32(16)), np.float32(0))


def narrow(value: Any, like: Any, noise: Any) -> Any:
    """A number as it is stored in an array: for bfloat16 the upper bits after ``noise`` was added to the lower ones."""
    raise NotImplementedError


@overload(narrow, strict=False)
def _narrow(value: Any, like: Any, noise: Any) -> Any:
    if isinstance(like.dtype, types.Float):
        return lambda value, like, noise: value

    def to_bfloat16(value: Any, like: Any, noise: Any) -> Any:
        bits = _same_bits(value, np.uint32(0))  # the lower ones of an infinite number are zero, and stay alone
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


class Work(NamedTuple):
    """How tensors are cut into chunks, and which of these, or of their strips, are to be done."""

    taken: Array  # (1,) how many of them the threads have taken
    chunks: Array  # or 4·chunk + strip
    sizes: Array  # (tensors,) entries
    first: Array  # (tensors,) the first chunk of each
    owners: Array  # (all chunks,) the tensor of each


@njit(error_model="numpy")  # a generator that comes from disk would not be known to kernels compiled after that
def _turns(work: Work) -> Any:
    """The chunks that fall to one thread."""
    place = _add(work.taken, 1)
    while place < work.chunks.size:
        yield work.chunks[place]
        place = _add(work.taken, 1)


@_compiled
def _entries(work: Work, chunk: int, addresses: Array, like: Array) -> Array:
    """The entries of a chunk; there is one address per tensor."""
    owner = work.owners[chunk]
    start = (chunk - work.first[owner]) * CHUNK
    return carray(_pointer(addresses[owner] + start * like.itemsize, like), min(CHUNK, work.sizes[owner] - start))


@_compiled
def _strip(values: Array, number: int) -> Array:
    """One of the four strips of a chunk; the last may be longer."""
    size = values.size // STRIPS
    return values[number * size : values.size if number == STRIPS - 1 else (number + 1) * size]


@_fast
def _measured(a: Array, b: Array, c: Array, d: Array, none: Any) -> Any:
    """Sums of squares, and the bits of the largest numbers, of four pieces of one length.

    Signs left out, bits are in the order of the numbers, with nan on top, and eight are compared at once. One piece
    after the other would leave the memory idle for a third of the time.
    """
    square_a = square_b = square_c = square_d = widen(a.dtype.type(0))
    most_a = most_b = most_c = most_d = none
    for index in range(a.size):
        one, two, three, four = widen(a[index]), widen(b[index]), widen(c[index]), widen(d[index])
        square_a, square_b = square_a + one * one, square_b + two * two
        square_c, square_d = square_c + three * three, square_d + four * four
        most_a, most_b = max(most_a, _same_bits(abs(one), none)), max(most_b, _same_bits(abs(two), none))
        most_c, most_d = max(most_c, _same_bits(abs(three), none)), max(most_d, _same_bits(abs(four), none))
    return (square_a, square_b, square_c, square_d), (most_a, most_b, most_c, most_d)


@_fast
def _clipped(values: Array, threshold: Any, ratio: Any) -> Any:
    """Sum of squares after clipping, and how many entries were clipped."""
    square = entries = np.float64(0)
    for index in range(values.size):
        value = widen(values[index])
        is_spike = abs(value) > threshold
        value = np.float64(value * ratio if is_spike else value)
        entries += is_spike
        square += value * value
    return square, entries


@_compiled
def _norm(square: Any, values: Array, threshold: Any, ratio: Any) -> Any:
    """The norm, from the sum of squares, or slowly where squares were too small for their dtype."""
    if not square <= TINY:  # or nan
        return np.sqrt(square)
    largest, square = np.float64(0), np.float64(0)
    for value in values:
        largest = max(largest, np.float64(abs(widen(value))))
    for value in values:
        wide = widen(value)
        square += (np.float64(wide * ratio if abs(wide) > threshold else wide) / largest) ** 2
    return largest * np.sqrt(square) if largest > 0 else largest


@_compiled
def measure(work: Work, grads: Array, like: Array, maxima: Array, norms: Array) -> None:
    """The largest |entry| (its bits) and the norm of each strip, (chunks, 4)."""
    none = maxima.dtype.type(0)
    for chunk in _turns(work):
        values = _entries(work, chunk, grads, like)
        a, b, c, d = _strip(values, 0), _strip(values, 1), _strip(values, 2), _strip(values, 3)
        maxima[chunk], norms[chunk] = 0, 0  # of the squares at first
        for start in range(0, d.size, BLOCK):
            here = slice(start, min(start + BLOCK, a.size))
            found = _measured(a[here], b[here], c[here], d[here], none)
            for strip in range(STRIPS):
                norms[chunk, strip] += found[0][strip]
                maxima[chunk, strip] = max(maxima[chunk, strip], found[1][strip])
        for value in d[a.size :]:
            norms[chunk, STRIPS - 1] += np.float64(widen(value)) ** 2
            maxima[chunk, STRIPS - 1] = max(maxima[chunk, STRIPS - 1], _same_bits(abs(widen(value)), none))
        for strip in range(STRIPS):
            if maxima[chunk, strip] > 0:
                norms[chunk, strip] = _norm(norms[chunk, strip], _strip(values, strip), np.inf, 1)


@_compiled
def measure_clipped(work: Work, grads: Array, like: Array, limits: Any, norms: Array, entries: Array) -> None:
    """The norm after clipping of strips, and how many entries were clipped; limits are T̂ and T̂/gmax of tensors."""
    for place in _turns(work):
        chunk, strip = divmod(place, STRIPS)
        threshold, ratio = limits[0][work.owners[chunk]], limits[1][work.owners[chunk]]
        values = _strip(_entries(work, chunk, grads, like), strip)
        square, entries[chunk, strip] = _clipped(values, threshold, ratio)
        norms[chunk, strip] = _norm(square, values, threshold, ratio)


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
def update(work: Work, addresses: Array, likes: Any, by: Array, stochastic: bool, seed: int) -> None:
    """Clip, normalise, reset and AdamW, by the `Coefficients` of tensors (tensors, 10).

    There are addresses of weights, gradients, M and V, (4, tensors), and a ``like`` of weights, gradients and moments.
    """
    for chunk in _turns(work):
        _update(
            _entries(work, chunk, addresses[0], likes[0]),
            _entries(work, chunk, addresses[1], likes[1]),
            _entries(work, chunk, addresses[2], likes[2]),
            _entries(work, chunk, addresses[3], likes[2]),
            *(by[work.owners[chunk]], stochastic, _scrambled(np.uint32(chunk) ^ np.uint32(seed))),
        )


@_fast
def _rescale(new: Array, grad: Array, by: Array) -> None:
    threshold, ratio, factor = by[0], by[1], by[2]
    for index in range(grad.size):
        value = widen(grad[index])
        value = (value * ratio if abs(value) > threshold else value) * factor
        new[index] = narrow(value, new, NEAREST)


@_compiled
def rescale(work: Work, new: Array, grads: Array, like: Array, by: Array) -> None:
    """Clip and normalise into the memory at the addresses in ``new``."""
    for chunk in _turns(work):
        _rescale(_entries(work, chunk, new, like), _entries(work, chunk, grads, like), by[work.owners[chunk]])


@_compiled
def copy_numbers(addresses: Array, like: Array, vector: Array, back: bool) -> None:
    """Copy the number at each address into a vector, or back."""
    for place in range(vector.size):
        number = carray(_pointer(addresses[place], like), 1)
        if back:
            number[0] = vector[place]
        else:
            vector[place] = number[0]
