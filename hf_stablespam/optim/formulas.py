"""The method as functions of tensors: AdaClip, AdaGN, the decay, and Adam. Symbols are those of arXiv 2502.17055.

What is kept for each tensor comes as a vector with one entry per tensor; a function that takes a gradient takes these
numbers 0-dimensional, or as a column beside a matrix whose rows belong to different tensors.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Coefficients(NamedTuple):
    """With what an update multiplies: vectors, columns or numbers."""

    threshold: Any  # T̂: what is larger is clipped
    ratio: Any  # T̂/gmax
    factor: Any  # AdaGN's c/n, with the sign of descent
    keep: Any  # sβ1, of the old M; 0 after a reset
    enter: Any  # 1 − sβ1, of the gradient in M
    keep_sq: Any  # β2, of the old V
    enter_sq: Any  # 1 − β2
    size: Any  # lr·√(1−β2ᵏ)/(1−(sβ1)ᵏ)
    decay: Any  # 1 − lr·wd
    eps: Any  # ε·√(1−β2ᵏ)


def bias_correction(beta: Tensor | float, step: Tensor) -> Tensor:
    """``1 − βᵗ`` for ``t ≥ 1``, through ``expm1`` so that float32 keeps it exact when β is close to 1.

    Example:
        >>> bias_correction(0.999, torch.tensor([1.0, 1000.0]))
        tensor([0.0010, 0.6323])
    """
    log = beta.log() if isinstance(beta, Tensor) else math.log(beta) if beta > 0 else -math.inf
    return -(step * log).expm1()


def cosine_decay(step: Tensor, decay_steps: int | str | None, decay_floor: float) -> Tensor | float:
    """Factor that multiplies β1 and γ1 at step ``t``: a cosine from 1 to ``f`` over ``D`` steps that stays there.

    ``s(t) = f + (1−f)·(1 + cos(π·min(t, D+1)/(D+1)))/2``; 1 without ``D``, or until the run's length is known.

    Example:
        >>> cosine_decay(torch.tensor([0.0, 50.5, 101.0, 500.0]), 100, 0.5)
        tensor([1.0000, 0.7500, 0.5000, 0.5000])
    """
    if decay_steps is None or decay_steps == "auto":
        return 1.0
    period = int(decay_steps) + 1
    cosine = (step.clamp(max=float(period)) * (math.pi / period)).cos()
    return decay_floor + (1 - decay_floor) * (1 + cosine) / 2


def is_reset_step(step: Tensor, reset_interval: int | None) -> Tensor:
    """Whether MoRet empties the moments at step ``t = 1, 2, …``: every ``ΔT`` steps."""
    return step < 0 if reset_interval is None else step % reset_interval == 0


def is_usable(norm: Tensor) -> Tensor:
    """Whether a gradient may enter any state: its squared norm is finite in the dtype of the statistics."""
    return norm * norm < torch.inf  # false for nan


def clip_threshold(clip_max: Tensor, grad_max: Tensor, step: Tensor, *, clip_beta: float) -> tuple[Tensor, Tensor]:
    """AdaClip's threshold: a debiased running mean of the largest gradient entry.

    ``T ← γ3·T + (1−γ3)·gmax``,  ``T̂ = T / (1−γ3ᵗ)``; ``t`` counts what entered ``T``, this gradient included.

    Returns:
        The new ``T``, and ``T̂``.
    """
    clip_max = clip_beta * clip_max + (1 - clip_beta) * grad_max
    return clip_max, clip_max / bias_correction(clip_beta, step)


def clip_ratio(grad_max: Tensor, threshold: Tensor) -> Tensor:
    """``T̂/gmax``, by which AdaClip scales every entry above ``T̂``; 1 where none is."""
    return torch.where(grad_max > threshold, threshold / grad_max, 1.0)


def clip_spikes(grad: Tensor, threshold: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:
    """AdaClip: scale (not clamp) the entries above the threshold: ``g_i ← g_i·T̂/gmax`` where ``|g_i| > T̂``.

    Returns:
        The clipped gradient (a new tensor), and which entries were clipped.
    """
    spikes = grad.abs() > threshold
    return torch.where(spikes, grad * ratio, grad), spikes


def norm_target(
    norm_mean: Tensor,
    norm_sq: Tensor,
    norm: Tensor,
    step: Tensor,
    *,
    norm_betas: tuple[float, float],
    decay: Tensor | float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """AdaGN's target norm: an Adam-like ratio of the two running moments of the clipped gradient's norm ``n``.

    ``m ← sγ1·m + (1−sγ1)·n``,  ``v ← γ2·v + (1−γ2)·n²``,  ``c = m̂ / (√v̂ + ε)``; ``t`` counts what entered them.

    Returns:
        The new ``m``, the new ``v``, and ``c``, the norm that the gradient is given.
    """
    gamma1, gamma2 = decay * norm_betas[0], norm_betas[1]
    norm_mean = gamma1 * norm_mean + (1 - gamma1) * norm
    norm_sq = gamma2 * norm_sq + (1 - gamma2) * (norm * norm)
    mean_hat = norm_mean / bias_correction(gamma1, step)
    root_hat = (norm_sq / bias_correction(gamma2, step)).sqrt()
    floor = torch.finfo(norm.dtype).tiny  # v of a tiny gradient underflows to 0, and eps may be 0
    return norm_mean, norm_sq, mean_hat / (root_hat + eps).clamp(min=floor)


def norm_factor(target: Tensor, norm: Tensor) -> Tensor:
    """``c/n``, the one factor by which AdaGN multiplies a gradient; 0 for a gradient of zeros (no division)."""
    factor = (target / norm).clamp(max=torch.finfo(norm.dtype).max)  # a denormal norm divides to inf
    return torch.where(norm > 0, factor, 0.0)


def scale_of(grad_max: Tensor) -> Tensor:
    """By what to divide before squaring: squares of tiny and huge entries leave float32's range otherwise."""
    return torch.where((grad_max > 0) & (grad_max < torch.inf), grad_max, 1.0)


def safe_norm(grad: Tensor, grad_max: Tensor) -> Tensor:
    """``‖g‖₂`` by way of ``gmax·‖g/gmax‖``."""
    scale = scale_of(grad_max)
    return scale * torch.linalg.vector_norm(grad / scale)


def adam_sizes(lr: Any, betas: tuple[Any, float], step: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``size`` and ``eps`` of `Coefficients` for ``k`` gradients in the moments, this one included.

    The least ``ε`` is ``√V`` of the smallest ``V`` above zero. It changes nothing of note, and where no gradient ever
    was anything but zero it divides 0 by a number.
    """
    root, limits = bias_correction(betas[1], step).sqrt(), torch.finfo(step.dtype)
    return lr * root / bias_correction(betas[0], step), max(eps, math.sqrt(limits.tiny * limits.eps)) * root


def adam_(weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, by: Coefficients) -> None:
    """MoRet and AdamW in place, on a stabilised gradient; all are of one dtype, float32 or float64.

    ``M ← β1·M + (1−β1)·g``,  ``V ← β2·V + (1−β2)·g²``,
    ``w ← w·(1−lr·wd) − lr·(M/(1−β1ᵏ)) / (√(V/(1−β2ᵏ)) + ε)``, the last as ``size·M/(√V + ε·√(1−β2ᵏ))``
    """
    exp_avg.mul_(by.keep).add_(grad * by.enter)
    exp_avg_sq.mul_(by.keep_sq).addcmul_(grad * by.enter_sq, grad)
    root = exp_avg_sq.sqrt().add_(by.eps)
    weight.mul_(by.decay).sub_((exp_avg * by.size).div_(root))
