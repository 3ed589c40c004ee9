"""AdaClip and AdaGN alone: the gradient that `stabilize` gives to another optimizer, and what was seen of it."""

import torch
from torch import Tensor

from hf_stablespam.optim.cpu_sweep import clip_copy
from hf_stablespam.optim.fused_cpu import FUSED_DTYPES, Seen, see
from hf_stablespam.optim.pieces import Scratch, flat_view, is_plain_tensor, share_layout
from hf_stablespam.optim.plan import Options, State, as_floats
from hf_stablespam.optim.single_tensor import stabilized

Statistics = dict[str, Tensor]  # 0-dimensional, by the names of `StableSPAM.statistics`


def stabilize_gradient(grad: Tensor, state: State, options: Options) -> tuple[Tensor | None, Statistics]:
    """Clip and normalise a gradient, and write the trackers.

    Args:
        grad: ``g``, not changed.
        state: the trackers.
        options: those of a parameter group that AdaClip, AdaGN and the plan of a step read.

    Returns:
        The new gradient, in the dtype and layout of the old one, and the statistics. Where the old gradient is not
        finite, the new one is on the CPU none at all; elsewhere, where nobody may look, it is zeros.
    """
    if _fits_cpu(grad):
        scratch = Scratch(state["clip_max"].dtype)
        seen = _see(grad, state, options, scratch)
        for name, value in seen.plan.trackers._asdict().items():
            state[name].fill_(value)
        return _scaled(grad, seen, scratch) if seen.plan.finite else None, _as_tensors(seen.statistics)
    new, plan, statistics = stabilized(grad, state, options)
    for name, value in plan.trackers._asdict().items():
        state[name].copy_(value)
    return without_nonfinite(new.to(grad.dtype), plan.finite), statistics


def gradient_statistics(grad: Tensor, state: State, options: Options) -> Statistics:
    """What a step sees of a gradient; nothing is changed. Arguments as of `stabilize_gradient`."""
    if _fits_cpu(grad):
        return _as_tensors(_see(grad, state, options, Scratch(state["clip_max"].dtype)).statistics)
    return stabilized(grad, state, options)[-1]


def without_nonfinite(grad: Tensor, finite: Tensor) -> Tensor | None:
    """The gradient, if it is finite; if not, ``None`` on the CPU and zeros elsewhere."""
    if finite.is_cpu:
        return grad if finite else None
    return torch.where(finite, grad, torch.zeros_like(grad))


def _fits_cpu(grad: Tensor) -> bool:
    if torch.compiler.is_compiling() or not (grad.is_cpu and grad.dtype in FUSED_DTYPES):
        return False
    return is_plain_tensor(grad) and share_layout([grad])


def _see(grad: Tensor, state: State, options: Options, scratch: Scratch) -> Seen:
    (old,) = as_floats([state])
    return see(grad, old, options, scratch)


def _as_tensors(statistics: dict[str, float]) -> Statistics:
    return {name: torch.tensor(value, dtype=torch.float32) for name, value in statistics.items()}


def _scaled(grad: Tensor, seen: Seen, scratch: Scratch) -> Tensor:
    factor = min(seen.plan.factor, scratch.largest)
    if grad.dtype == scratch.dtype and seen.spikes is not None:  # in one pass
        new = torch.empty_like(grad)
        flat = torch.mul(flat_view(grad), factor, out=flat_view(new))
        for spike in seen.spikes:
            flat[spike.place] = spike.value * seen.limits.ratio * factor
        return new
    new = grad.to(scratch.dtype, copy=True)
    flat = flat_view(new)
    clip_copy(flat, 0, seen.spikes, seen.limits)
    flat.mul_(factor)
    return new.to(grad.dtype)
