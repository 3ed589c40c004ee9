"""Clipping by the global norm that leaves the other tensors alone when one gradient is not finite."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor

from hf_stablespam._sharded import full
from hf_stablespam.monitor.norms import Shards

# Where parameters are whole or `DTensor`s, and clipping is torch's own.
_PLAIN = {
    DistributedType.NO,
    *(kind for kind in DistributedType if kind.value.startswith("MULTI_")),
}


def can_clip(accelerator: Any, parameters: Sequence[Tensor]) -> bool:
    """Whether `clip` does here what accelerate would do: not for DeepSpeed, XLA, Megatron, FSDP1, nor partial sums."""
    kind = accelerator.distributed_type
    whole = kind in _PLAIN or (kind == DistributedType.FSDP and getattr(accelerator, "is_fsdp2", False))
    grads = [param.grad for param in parameters if param.grad is not None]
    partial = any(
        placement.is_partial() for grad in grads if hasattr(grad, "placements") for placement in grad.placements
    )
    return whole and bool(grads) and not partial


@torch.no_grad()
def clip(parameters: Sequence[Tensor], max_norm: float) -> tuple[Tensor, Tensor | None]:
    """Scale gradients so that their norm, taken as one vector, is at most `max_norm`, as torch's `clip_grad_norm_`.

    A tensor whose gradient is not finite takes no part in the norm that the others are scaled by: they are clipped as
    if it were not there. (torch scales by `max_norm / norm`, which is `nan` or 0 for all of them.) Where all are finite
    the result is torch's, bit for bit on one process. An infinite `max_norm` measures only.

    Args:
        parameters: some with gradients, plain ones or `DTensor`s.
        max_norm: the largest norm to leave.

    Returns:
        The norm of all gradients as they came (not finite where one of them is not), and what they were multiplied by,
        `None` for nothing; 0-dim, on the device of the first gradient.
    """
    grads = [param.grad for param in parameters if param.grad is not None]
    shards = Shards(grads)
    local = shards.local(grads)
    norms = _norms(grads, local, shards)
    total = torch.linalg.vector_norm(norms)
    if math.isinf(max_norm):
        return total, None
    finite = torch.linalg.vector_norm(torch.where(norms.isfinite(), norms, 0.0))
    factor = coefficient(finite, max_norm)
    if all(grad.device == factor.device for grad in local):
        torch._foreach_mul_(list(local), factor)
    else:
        for grad in local:
            grad.mul_(factor.to(grad.device))
    return total, factor


@torch.no_grad()
def clip_over_meshes(parameters: Sequence[Tensor], max_norm: float) -> tuple[Tensor, Tensor | None]:
    """The same where gradients live on several device meshes, as with expert parallelism beside FSDP2.

    No collective spans two meshes: there is one for each, which gives all norms of its tensors.
    """
    by_mesh: dict[Any, list[Tensor]] = {}
    for param in parameters:
        if param.grad is not None:
            by_mesh.setdefault(getattr(param.grad, "device_mesh", None), []).append(param.grad)
    norms = torch.cat([full(torch.stack(list(torch._foreach_norm(grads, 2)))) for grads in by_mesh.values()])
    total = torch.linalg.vector_norm(norms)
    if math.isinf(max_norm):
        return total, None
    factor = coefficient(torch.linalg.vector_norm(torch.where(norms.isfinite(), norms, 0.0)), max_norm)
    for grads in by_mesh.values():
        for grad in grads:
            shard = grad.to_local() if hasattr(grad, "to_local") else grad
            shard.mul_(factor.to(shard.device))
    return total, factor


def coefficient(norm: Any, max_norm: float) -> Any:
    """What torch's clipping multiplies gradients of this norm by; `None` where it measures only."""
    if math.isinf(max_norm):
        return None
    scale = max_norm / (norm + 1e-6)
    return scale.clamp(max=1.0) if isinstance(scale, Tensor) else min(scale, 1.0)


def _norms(grads: Sequence[Tensor], local: Sequence[Tensor], shards: Shards) -> Tensor:
    """The norm of each whole gradient, (N,)."""
    if any(grad is not shard for grad, shard in zip(grads, local, strict=True)):
        return shards.norms(local)[0]
    return torch.stack([norm.to(shards.device) for norm in torch._foreach_norm(list(local), 2)])
