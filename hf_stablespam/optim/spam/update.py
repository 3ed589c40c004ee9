"""One step of SPAM for one tensor: the spike-aware clipping, the warm-up and the sparse update, as functions."""

import math

import torch
from torch import Tensor

from hf_stablespam.optim.formulas import Coefficients, adam_, adam_sizes, is_usable, safe_norm
from hf_stablespam.optim.plan import MOMENTS, Options, State
from hf_stablespam.optim.state.sparse_mask import mask_indices

_SMALLEST_WARMUP = 0.01


def clip_to_history(grad: Tensor, exp_avg_sq: Tensor, threshold: float, active: Tensor) -> tuple[Tensor, Tensor]:
    """SPAM's clipping: ``g_i ← sign(g_i)·√(θ·V_i)`` where ``g_i² > θ·V_i``.

    ``V`` is that before this step; where it is 0 there is no history and no clipping, nor where ``active`` is false.

    Returns:
        The clipped gradient (a new tensor), and the number of clipped entries.

    Example:
        >>> grad, history = torch.tensor([30.0, -1.0]), torch.tensor([0.01, 0.01])
        >>> clip_to_history(grad, history, 400.0, torch.tensor(True))
        (tensor([ 2., -1.]), tensor(1))
    """
    limit = exp_avg_sq.sqrt() * math.sqrt(threshold)
    spikes = (grad.abs() > limit) & (exp_avg_sq > 0) & active
    return torch.where(spikes, grad.sign() * limit, grad), spikes.sum()


def warmup_factor(moment_step: Tensor, warmup_steps: int) -> Tensor:
    """The factor on the update at the ``k``-th step after a reset: a cosine from 0.01 up to 1.

    ``u(k) = 1 − 0.99·(1 + cos(π·min(k−1, N)/N))/2``

    Example:
        >>> warmup_factor(torch.tensor([1.0, 76.0, 151.0, 400.0]), 150)
        tensor([0.0100, 0.5050, 1.0000, 1.0000])
    """
    if warmup_steps == 0:
        return torch.ones_like(moment_step)
    cosine = torch.cos((moment_step - 1).clamp(max=warmup_steps) * (math.pi / warmup_steps))
    return 1 - (1 - _SMALLEST_WARMUP) * (1 + cosine) / 2


def spam_step(param: Tensor, grad: Tensor, state: State, options: Options, warms_up: bool) -> dict[str, Tensor]:
    """Update a parameter and its state in place; a gradient whose squared norm is not finite changes nothing.

    With a ``mask`` the moments hold the entries that it keeps. ``warms_up`` says that the moments were reset at some
    time. Returns 0-dimensional tensors by the names of `SPAM.statistics`.
    """
    precise = torch.promote_types(param.dtype, torch.float32)
    grad = -grad.to(precise) if options["maximize"] else grad.to(precise)
    grad_max = grad.abs().amax()
    grad_norm = safe_norm(grad, grad_max)
    finite = is_usable(grad_norm)
    old, kept = param, None
    if "mask" in state:
        kept = mask_indices(state["mask"], param.numel(), options["density"])
        old, grad = (tensor.reshape(-1).index_select(0, kept) for tensor in (param, grad))

    lr, (beta1, beta2), k = options["lr"], options["betas"], state["moment_step"] + 1
    lr = lr.squeeze() if isinstance(lr, Tensor) else lr  # of one element, and the parameter may have no dimension
    weight = old.to(precise, copy=True)
    exp_avg, exp_avg_sq = (state[name].to(precise, copy=True) for name in MOMENTS)
    clipped = torch.zeros_like(grad_max)
    if options["threshold"] is not None:
        grad, clipped = clip_to_history(grad, exp_avg_sq, options["threshold"], k > options["clip_delay"])
    size, eps = adam_sizes(lr, options["betas"], k.to(precise), options["eps"])
    if warms_up:
        size = size * warmup_factor(k.to(precise), options["warmup_steps"])
    decay, betas = 1 - lr * options["weight_decay"], (beta1, 1 - beta1, beta2, 1 - beta2)
    adam_(weight, grad, exp_avg, exp_avg_sq, Coefficients(math.inf, 1.0, 1.0, *betas, size, decay, eps))

    for name, value in (("moment_step", k), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        state[name].copy_(torch.where(finite, value.to(state[name].dtype), state[name]))
    weight = torch.where(finite, weight.to(param.dtype), old)
    if kept is None:
        param.copy_(weight)
    elif param.is_contiguous():
        param.view(-1).index_copy_(0, kept, weight)
    else:
        param.copy_(param.reshape(-1).index_copy(0, kept, weight).view(param.shape))
    norm = safe_norm(grad, grad_max)
    seen = {"grad_norm": grad_norm, "grad_max": grad_max, "clip_threshold": torch.full_like(norm, torch.inf)}
    seen |= {"clipped": clipped.to(norm.dtype), "norm_factor": torch.ones_like(norm), "stable_norm": norm}
    return {**seen, "nonfinite": (~finite).to(norm.dtype)}
