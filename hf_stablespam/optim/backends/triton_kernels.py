"""Four Triton kernels over many tensors at once: measure gradients, measure them clipped, update, rescale.

A program takes one chunk of ``BLOCK`` entries of one tensor; tables say which (see `triton_ops`). Nothing is rewritten
but weights and moments: spikes are clipped in registers, where the update reads the gradient.
"""

import triton
import triton.language as tl

BLOCK = 4096  # entries of a chunk


@triton.jit
def _norm(values):
    """``‖values‖`` by way of its largest entry, so that squares stay in range; ``nan`` where there is one."""
    largest = tl.max(tl.abs(values), axis=0)
    scale = tl.where((largest > 0) & (largest < float("inf")), largest, 1.0)
    scaled = values / scale
    norm = scale * tl.sqrt(tl.sum(scaled * scaled, axis=0))
    return tl.where(norm != norm, norm, largest), norm  # a maximum alone loses nan


@triton.jit
def _chunk(owners, starts, sizes, BLOCK: tl.constexpr):
    """Which tensor this program works on, which of its entries, and which of these exist."""
    program = tl.program_id(0)
    owner = tl.load(owners + program)
    offsets = tl.load(starts + program) + tl.arange(0, BLOCK).to(tl.int64)
    return program, owner, offsets, offsets < tl.load(sizes + owner)


@triton.jit
def _load(pointers, owner, offsets, mask, like):
    """Entries of a tensor found by its address, widened to float32."""
    pointer = tl.load(pointers + owner).to(like.dtype)
    return tl.load(pointer + offsets, mask=mask, other=0).to(tl.float32)


@triton.jit
def _store(pointers, owner, offsets, mask, like, values):
    """Write entries of a tensor found by its address, rounded to its dtype."""
    pointer = tl.load(pointers + owner).to(like.dtype)
    tl.store(pointer + offsets, values.to(like.dtype.element_ty), mask=mask)


@triton.jit
def _stabilized(grad, row):
    """A gradient clipped and normalised by its row of coefficients."""
    return tl.where(tl.abs(grad) > tl.load(row), grad * tl.load(row + 1), grad) * tl.load(row + 2)


@triton.jit
def measure(grads, like, owners, starts, sizes, chunk_max, chunk_norm, BLOCK: tl.constexpr):
    """``max|g|`` and ``‖g‖`` of each chunk."""
    program, owner, offsets, mask = _chunk(owners, starts, sizes, BLOCK)
    grad = _load(grads, owner, offsets, mask, like)
    largest, norm = _norm(grad)
    tl.store(chunk_max + program, largest)
    tl.store(chunk_norm + program, norm)


@triton.jit
def measure_clipped(
    grads, like, owners, starts, sizes, chunk_max, thresholds, ratios, chunk_norm, chunk_count, BLOCK: tl.constexpr
):
    """The same after clipping, for the few chunks that hold a spike; the others leave at once."""
    program, owner, offsets, mask = _chunk(owners, starts, sizes, BLOCK)
    threshold = tl.load(thresholds + owner)
    if tl.load(chunk_max + program) > threshold:
        grad = _load(grads, owner, offsets, mask, like)
        spikes = tl.abs(grad) > threshold
        grad = tl.where(spikes, grad * tl.load(ratios + owner), grad)
        _, norm = _norm(grad)
        tl.store(chunk_norm + program, norm)
        tl.store(chunk_count + program, tl.sum(spikes.to(tl.float32), axis=0))


@triton.jit
def update(
    params,
    grads,
    exp_avgs,
    exp_avg_sqs,
    param_like,
    grad_like,
    moment_like,
    owners,
    starts,
    sizes,
    finite,  # (tensors,) 1, or 0 for what is passed over
    coefficients,  # (tensors, 10), `formulas.Coefficients`
    seed,
    BLOCK: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """Clip, normalise, reset and AdamW; a tensor that is passed over is not touched."""
    program, owner, offsets, mask = _chunk(owners, starts, sizes, BLOCK)
    row = coefficients + owner * 10
    if tl.load(finite + owner) > 0:
        grad = _stabilized(_load(grads, owner, offsets, mask, grad_like), row)
        exp_avg = tl.load(row + 3) * _load(exp_avgs, owner, offsets, mask, moment_like) + tl.load(row + 4) * grad
        exp_avg_sq = _load(exp_avg_sqs, owner, offsets, mask, moment_like)
        exp_avg_sq = tl.load(row + 5) * exp_avg_sq + tl.load(row + 6) * grad * grad
        weight = _load(params, owner, offsets, mask, param_like) * tl.load(row + 8)
        weight -= tl.load(row + 7) * exp_avg / (tl.sqrt(exp_avg_sq) + tl.load(row + 9))
        if STOCHASTIC:
            noise = (tl.randint(tl.load(seed), program * BLOCK + tl.arange(0, BLOCK)) & 0xFFFF).to(tl.int32)
            weight = ((weight.to(tl.int32, bitcast=True) + noise) & -65536).to(tl.float32, bitcast=True)
        _store(params, owner, offsets, mask, param_like, weight)
        _store(exp_avgs, owner, offsets, mask, moment_like, exp_avg)
        _store(exp_avg_sqs, owner, offsets, mask, moment_like, exp_avg_sq)


@triton.jit
def rescale(new, grads, like, owners, starts, sizes, finite, coefficients, BLOCK: tl.constexpr):
    """Clipped and normalised copies; zeros for a tensor that is passed over."""
    _, owner, offsets, mask = _chunk(owners, starts, sizes, BLOCK)
    grad = _stabilized(_load(grads, owner, offsets, mask, like), coefficients + owner * 10)
    _store(new, owner, offsets, mask, like, tl.where(tl.load(finite + owner) > 0, grad, 0.0))
