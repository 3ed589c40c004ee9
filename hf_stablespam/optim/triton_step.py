"""The fast path on CUDA: eight passes over tensors where fused AdamW makes seven, and nothing read back to the host.

One reading of the gradients measures them, one pass updates; chunks with spikes are measured a second time. The
trackers stay on the device and go through the same `plan` as on every path. Usable in a CUDA graph after a warm-up
step. Not yet run on a GPU: tested in Triton's interpreter.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from hf_stablespam.optim import triton_kernels as kernels
from hf_stablespam.optim.plan import (
    Batch,
    Clipping,
    Options,
    Plan,
    plan_adam,
    plan_clipping,
    stack_trackers,
    step_statistics,
    store_trackers,
)


class Tables(NamedTuple):
    """Where everything is, on the device; int64."""

    addresses: tuple[Tensor, Tensor, Tensor, Tensor]  # weights, gradients, M, V; each (tensors,)
    sizes: Tensor  # (tensors,) entries
    owners: Tensor  # (chunks,) index of the tensor of each chunk
    starts: Tensor  # (chunks,) its first entry
    counts: Tensor  # (tensors,) number of chunks


class Measured(NamedTuple):
    """Maximum and norm of each tensor, and of each chunk."""

    grad_max: Tensor
    norm: Tensor
    chunk_max: Tensor
    chunk_norm: Tensor


def triton_step(batch: Batch, options: Options) -> dict[str, Tensor]:
    """One step for parameters of one device and dtype, whose weight, gradient and moments share a gapless layout.

    Args:
        batch: parameters of at most 32 bits, gradients, states.
        options: the parameter group.

    Returns:
        The statistics, each a vector with one entry per parameter.
    """
    old, tables = stack_trackers(batch.states), _tables_of(batch)
    raw = _measure(batch, tables)
    clipping = plan_clipping(old, raw.grad_max, options)
    clipped, norm = _measure_clipped(batch, tables, raw, clipping, options)
    plan = plan_adam(old, clipping, raw.norm, norm, options)
    store_trackers(batch.states, plan.trackers)
    _update(batch, tables, clipping, plan, options)
    return step_statistics(raw.norm, raw.grad_max, clipping, clipped, norm, plan)


def _tables_of(batch: Batch) -> Tables:
    columns = (batch.params, batch.grads, *([s[name] for s in batch.states] for name in ("exp_avg", "exp_avg_sq")))
    addresses = tuple(tuple(tensor.data_ptr() for tensor in column) for column in columns)
    return _tables(addresses, tuple(param.numel() for param in batch.params), batch.params[0].device)


@lru_cache(maxsize=64)
def _tables(addresses: tuple[tuple[int, ...], ...], sizes: tuple[int, ...], device: torch.device) -> Tables:
    """Tables for these addresses; what is remembered is named by all that matters to it, so it is never stale."""
    counts = [-(-size // kernels.BLOCK) for size in sizes]
    owners = [owner for owner, count in enumerate(counts) for _ in range(count)]
    starts = [chunk * kernels.BLOCK for count in counts for chunk in range(count)]

    def vector(values: tuple[int, ...] | list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    weights, grads, exp_avgs, exp_avg_sqs = (vector(column) for column in addresses)
    return Tables(
        (weights, grads, exp_avgs, exp_avg_sqs), vector(sizes), vector(owners), vector(starts), vector(counts)
    )


def _measure(batch: Batch, tables: Tables) -> Measured:
    chunk_max = torch.empty(len(tables.owners), dtype=torch.float32, device=tables.owners.device)
    chunk_norm = torch.empty_like(chunk_max)
    where = (tables.owners, tables.starts, tables.sizes)
    kernels.measure[(len(tables.owners),)](
        tables.addresses[1], batch.grads[0], *where, chunk_max, chunk_norm, BLOCK=kernels.BLOCK
    )
    grad_max = torch.segment_reduce(chunk_max, "max", lengths=tables.counts, unsafe=True)
    return Measured(grad_max, _combined(chunk_norm, grad_max, tables), chunk_max, chunk_norm)


def _combined(chunk_norm: Tensor, grad_max: Tensor, tables: Tables) -> Tensor:
    """Norms of tensors from those of their chunks, scaled so that squares stay in range."""
    scale = torch.where(grad_max > 0, grad_max, 1)
    squares = (chunk_norm / scale[tables.owners]).square()
    return scale * torch.segment_reduce(squares, "sum", lengths=tables.counts, unsafe=True).sqrt()


def _measure_clipped(
    batch: Batch, tables: Tables, raw: Measured, clipping: Clipping, options: Options
) -> tuple[Tensor, Tensor]:
    """How many entries of each tensor are clipped, and its norm afterwards."""
    if options["clip_beta"] is None:
        return torch.zeros_like(raw.norm), raw.norm
    chunk_norm, chunk_count = raw.chunk_norm.clone(), torch.zeros_like(raw.chunk_norm)
    kernels.measure_clipped[(len(tables.owners),)](
        tables.addresses[1],
        batch.grads[0],
        tables.owners,
        tables.starts,
        tables.sizes,
        raw.chunk_max,
        clipping.threshold,
        clipping.ratio,
        chunk_norm,
        chunk_count,
        BLOCK=kernels.BLOCK,
    )
    clipped = torch.segment_reduce(chunk_count, "sum", lengths=tables.counts, unsafe=True)
    return clipped, _combined(chunk_norm, raw.grad_max, tables)


def _coefficients(clipping: Clipping, plan: Plan, options: Options) -> Tensor:
    """What the update needs for each tensor, (tensors, 12) in the order in which the kernel reads them."""
    lr, (_, beta2), ones = options["lr"], options["betas"], torch.ones_like(plan.factor)
    sign = -1 if options["maximize"] else 1
    columns = [
        plan.finite.to(ones),
        clipping.threshold,
        clipping.ratio,
        plan.factor * sign,
        plan.beta1 * plan.carry,
        1 - plan.beta1,
        beta2 * plan.carry_sq,
        (1 - beta2) * ones,
        plan.correction1,
        plan.correction2,
        lr * ones,
        (1 - lr * options["weight_decay"]) * ones,
    ]
    return torch.stack(columns, dim=1)


def _update(batch: Batch, tables: Tables, clipping: Clipping, plan: Plan, options: Options) -> None:
    device = tables.owners.device
    stochastic = options["stochastic_rounding"] and batch.params[0].dtype == torch.bfloat16
    seed = torch.randint(1 << 31, (1,), device=device) if stochastic else tables.counts
    kernels.update[(len(tables.owners),)](
        *tables.addresses,
        batch.params[0],
        batch.grads[0],
        batch.states[0]["exp_avg"],
        tables.owners,
        tables.starts,
        tables.sizes,
        _coefficients(clipping, plan, options),
        seed,
        options["eps"],
        BLOCK=kernels.BLOCK,
        STOCHASTIC=stochastic,
    )
