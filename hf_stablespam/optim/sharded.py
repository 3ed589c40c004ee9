"""One step of Stable-SPAM for sharded parameters (`DTensor`: FSDP2, HSDP, tensor parallel), by whole-tensor statistics.

Letting each `DTensor` reduce itself costs two collectives per tensor and statistic. Here every process reduces its own
shards, and what it found travels stacked: one maximum (AdaClip's threshold needs it first) and one sum (AdaGN needs the
norm of the clipped gradient) serve all tensors of the step.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hf_stablespam.optim.schedule import cosine_decay
from hf_stablespam.optim.single_tensor import Options, State, update
from hf_stablespam.optim.stabilize import clip_ratio, clip_spikes, clip_threshold, norm_factor, norm_target


class Sharded(NamedTuple):
    """The sharded parameters of one parameter group, with their states; empty local shards are ordinary."""

    options: Options
    params: list[Any]  # DTensors with a gradient
    states: list[State]


class _Processes(NamedTuple):
    """A process group, and which of the step's tensors are sharded over it."""

    group: dist.ProcessGroup
    device: str  # where the group's backend wants its tensors
    tensors: list[int]


class _Clipping(NamedTuple):
    """What AdaClip found for the tensors of one parameter group; vectors with one entry per tensor."""

    step: Tensor
    grad_max: Tensor
    clip_max: Tensor
    threshold: Tensor
    ratio: Tensor

    @property
    def scale(self) -> Tensor:
        """By which gradients are divided before they are squared, to stay within float32's range."""
        return torch.where(self.grad_max > 0, self.grad_max, torch.ones_like(self.grad_max))


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a `DTensor` (without importing them where nobody shards)."""
    return hasattr(tensor, "device_mesh")


def sharded_step(batches: Sequence[Sharded]) -> dict[Tensor, dict[str, Tensor]]:
    """Update all sharded parameters of a step, and their states, in place.

    Costs one ``MAX`` and one ``SUM`` all-reduce for each process group over which any of the tensors is sharded: two
    for FSDP2 and HSDP, four for FSDP2 with tensor parallelism. Every process of a mesh must call it with the same
    parameters.

    Args:
        batches: the sharded parameters that have a gradient, by parameter group.

    Returns:
        For each parameter the statistics of the whole tensor, as `stable_spam_step` returns them.

    Raises:
        ValueError: for a parameter that holds a partial sum.
    """
    params = [param for batch in batches for param in batch.params]
    if not params:
        return {}
    processes = _processes(params)
    grads = _split([_local_gradient(*row) for batch in batches for row in _rows(batch)], batches)

    maxima = _all_reduce([_local_maxima(grad) for part in grads for grad in part], processes, dist.ReduceOp.MAX)
    clippings = [_clipping(*row) for row in zip(batches, _split(maxima, batches), strict=True)]
    sums = [_local_sums(*row) for row in zip(grads, clippings, strict=True)]
    sums = _split(_all_reduce([row for part in sums for row in part], processes, dist.ReduceOp.SUM), batches)

    statistics: dict[Tensor, dict[str, Tensor]] = {}
    for row in zip(batches, grads, clippings, sums, strict=True):
        statistics |= _apply(*row)
    return statistics


def _rows(batch: Sharded) -> Iterable[tuple[Any, State, Options]]:
    return ((param, state, batch.options) for param, state in zip(batch.params, batch.states, strict=True))


def _split(values: list[Any], batches: Sequence[Sharded]) -> list[list[Any]]:
    """A list with one entry per tensor, cut into one list per batch."""
    rest = iter(values)
    return [[next(rest) for _ in batch.params] for batch in batches]


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if is_sharded(tensor) else tensor


def _local_gradient(param: Any, state: State, options: Options) -> Tensor:
    grad = param.grad
    if grad.placements != param.placements:  # a replicated weight under tensor parallelism may get partial sums
        grad = grad.redistribute(param.device_mesh, param.placements)
    grad = grad.to_local().to(state["clip_max"].dtype)
    return -grad if options["maximize"] else grad


def _processes(params: list[Any]) -> list[_Processes]:
    """The process groups to reduce over, in the order of first appearance: the same on every process."""
    found: dict[tuple[int, ...], _Processes] = {}
    for index, param in enumerate(params):
        mesh = param.device_mesh
        for dim, placement in enumerate(param.placements):
            if placement.is_partial():
                raise ValueError(
                    f"parameters must be sharded or replicated, got {placement} on dimension {dim} of {mesh} for a "
                    f"parameter of shape {tuple(param.shape)}; redistribute it with Shard or Replicate"
                )
            if not placement.is_replicate() and mesh.size(dim) > 1:
                group = mesh.get_group(dim)
                ranks = tuple(dist.get_process_group_ranks(group))
                found.setdefault(ranks, _Processes(group, mesh.device_type, [])).tensors.append(index)
    return list(found.values())


def _all_reduce(columns: list[Tensor], processes: list[_Processes], op: Any) -> list[Tensor]:
    """Reduce one small vector per tensor over the processes that share the tensor."""
    for group, device, tensors in processes:
        together = torch.stack([columns[index] for index in tensors], dim=1).to(device)
        dist.all_reduce(together, op, group=group)
        for index, column in zip(tensors, together.unbind(1), strict=True):
            columns[index] = column.to(columns[index])
    return columns


def _local_maxima(grad: Tensor) -> Tensor:
    """``[max|g|, whether g has a nan]`` of a shard: the backends' ``MAX`` may lose a ``nan``."""
    if grad.numel() == 0:
        return grad.new_zeros(2)
    largest = grad.abs().amax()
    is_nan = largest.isnan()
    return torch.stack([largest.masked_fill(is_nan, 0), is_nan.to(largest)])


def _clipping(batch: Sharded, maxima: list[Tensor]) -> _Clipping:
    largest, has_nan = torch.stack(maxima, dim=1)
    grad_max = largest.masked_fill(has_nan > 0, torch.nan)
    step = torch.stack([state["step"] for state in batch.states]).to(grad_max) + 1
    clip_max = torch.stack([state["clip_max"] for state in batch.states])
    threshold = torch.full_like(grad_max, torch.inf)
    if batch.options["clip_beta"] is not None:
        clip_max, threshold = clip_threshold(clip_max, grad_max, step, clip_beta=batch.options["clip_beta"])
    return _Clipping(step, grad_max, clip_max, threshold, clip_ratio(grad_max, threshold))


def _local_sums(grads: list[Tensor], clipping: _Clipping) -> list[Tensor]:
    """``[Σ(g/scale)², Σ(clipped g/scale)², number of clipped entries]`` of each shard."""
    rows = zip(grads, clipping.threshold, clipping.ratio, clipping.scale, strict=True)
    return [_shard_sums(*row) for row in rows]


def _shard_sums(grad: Tensor, threshold: Tensor, ratio: Tensor, scale: Tensor) -> Tensor:
    clipped, number = clip_spikes(grad, threshold, ratio)
    norms = [torch.linalg.vector_norm(part / scale) for part in (grad, clipped)]
    return torch.stack([norms[0].square(), norms[1].square(), number.to(scale)])


def _apply(
    batch: Sharded, grads: list[Tensor], clipping: _Clipping, sums: list[Tensor]
) -> dict[Tensor, dict[str, Tensor]]:
    """AdaGN and Adam on the shards: the clipped gradient is made again, rather than kept for every tensor."""
    grad_squares, clipped_squares, number = torch.stack(sums, dim=1)
    grad_norm, norm = clipping.scale * grad_squares.sqrt(), clipping.scale * clipped_squares.sqrt()
    trackers, factor = _normalizing(batch, clipping, norm)
    columns = {
        "grad_norm": grad_norm,
        "grad_max": clipping.grad_max,
        "clip_threshold": clipping.threshold,
        "clipped": number,
        "norm_factor": factor,
        "stable_norm": norm * factor,
        "nonfinite": (~grad_norm.square().isfinite()).to(norm),
        "reset": torch.zeros_like(norm),
    }
    statistics = {}
    for index, (param, state, options) in enumerate(_rows(batch)):
        grad, _ = clip_spikes(grads[index], clipping.threshold[index], clipping.ratio[index])
        row = statistics[param] = {name: column[index] for name, column in columns.items()}
        new = {"step": state["step"] + 1} | {name: column[index] for name, column in trackers.items()}
        shards = {name: _local(value) for name, value in state.items()}
        update(_local(param), grad * factor[index], new, shards, options, row)
    return statistics


def _normalizing(batch: Sharded, clipping: _Clipping, norm: Tensor) -> tuple[State, Tensor]:
    """AdaGN's factor, and the trackers of AdaClip and AdaGN that this step changes."""
    options, trackers = batch.options, {}
    if options["clip_beta"] is not None:
        trackers["clip_max"] = clipping.clip_max
    if options["norm_betas"] is None:
        return trackers, torch.ones_like(norm)
    trackers["norm_mean"], trackers["norm_sq"], target = norm_target(
        torch.stack([state["norm_mean"] for state in batch.states]),
        torch.stack([state["norm_sq"] for state in batch.states]),
        norm,
        clipping.step,
        norm_betas=options["norm_betas"],
        decay=cosine_decay(clipping.step, options["decay_steps"], options["decay_floor"]),
        eps=options["eps"],
    )
    return trackers, norm_factor(target, norm)
