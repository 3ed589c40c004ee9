"""AdaClip and AdaGN as functions of tensors: what Stable-SPAM puts in front of Adam.

Everything here works on one gradient with 0-dimensional trackers or Python floats, and (except for the two functions
that take a gradient) on many at once, with trackers stacked to one vector. Symbols are those of arXiv 2502.17055.
"""

import math

import torch
from torch import Tensor

from hf_stablespam.optim.numbers import Number, at_least, at_most, divide, expm1, range_of, sqrt, where


def bias_correction(beta: Number, step: Number) -> Number:
    """``1 − βᵗ`` for ``t ≥ 1``, through ``expm1`` so that float32 keeps it exact when β is close to 1.

    Example:
        >>> bias_correction(0.999, torch.tensor([1.0, 1000.0]))
        tensor([0.0010, 0.6323])
    """
    if isinstance(beta, Tensor):
        log_beta: Number = beta.log()
    else:
        log_beta = math.log(beta) if beta > 0 else -math.inf
    return -expm1(step * log_beta)


def clip_threshold(clip_max: Number, grad_max: Number, step: Number, *, clip_beta: float) -> tuple[Number, Number]:
    """AdaClip's threshold: a debiased running mean of the largest gradient entry.

    ``T ← γ3·T + (1−γ3)·gmax``,  ``T̂ = T / (1−γ3ᵗ)``

    Args:
        clip_max: ``T`` before this step.
        grad_max: ``gmax = max|g|`` of this step's gradient.
        step: ``t``, steps that entered ``T``, this one included.
        clip_beta: ``γ3`` in [0, 1).

    Returns:
        The new ``T``, and ``T̂``.
    """
    clip_max = clip_beta * clip_max + (1 - clip_beta) * grad_max
    return clip_max, clip_max / bias_correction(clip_beta, step)


def clip_ratio(grad_max: Number, threshold: Number) -> Number:
    """``T̂/gmax``, by which AdaClip scales every entry above ``T̂``; 1 for a gradient of zeros."""
    return where(grad_max > threshold, divide(threshold, grad_max), 1.0)


def clip_spikes(grad: Tensor, threshold: Tensor | float, ratio: Tensor | float) -> tuple[Tensor, Tensor]:
    """AdaClip: scale (not clamp) the entries above the threshold: ``g_i ← g_i·T̂/gmax`` where ``|g_i| > T̂``.

    Args:
        grad: ``g``, any shape.
        threshold: ``T̂``, a number or 0-dimensional.
        ratio: ``T̂/gmax`` from `clip_ratio`, a number or 0-dimensional.

    Returns:
        The clipped gradient (a new tensor), and the number of clipped entries.
    """
    spikes = grad.abs() > threshold
    return torch.where(spikes, grad * ratio, grad), spikes.count_nonzero()


def norm_target(
    norm_mean: Number,
    norm_sq: Number,
    norm: Number,
    step: Number,
    *,
    norm_betas: tuple[float, float],
    decay: Number,
    eps: float,
) -> tuple[Number, Number, Number]:
    """AdaGN's target norm: an Adam-like ratio of the two running moments of the gradient's norm.

    ``m ← sγ1·m + (1−sγ1)·n``,  ``v ← γ2·v + (1−γ2)·n²``,  ``c = m̂ / (√v̂ + ε)``

    Args:
        norm_mean: ``m`` before this step.
        norm_sq: ``v`` before this step.
        norm: ``n = ‖g‖₂`` of the clipped gradient.
        step: ``t``, steps that entered ``m`` and ``v``, this one included.
        norm_betas: ``(γ1, γ2)``, each in [0, 1).
        decay: ``s``, which multiplies ``γ1``.
        eps: ``ε``, added to ``√v̂``.

    Returns:
        The new ``m``, the new ``v``, and ``c``, the norm that the gradient is given.
    """
    gamma1, gamma2 = decay * norm_betas[0], norm_betas[1]
    norm_mean = gamma1 * norm_mean + (1 - gamma1) * norm
    norm_sq = gamma2 * norm_sq + (1 - gamma2) * (norm * norm)
    mean_hat = norm_mean / bias_correction(gamma1, step)
    root_hat = sqrt(norm_sq / bias_correction(gamma2, step))
    floor = range_of(norm).tiny  # v of a tiny gradient underflows to 0, and eps may be 0
    return norm_mean, norm_sq, mean_hat / at_least(root_hat + eps, floor)


def norm_factor(target: Number, norm: Number) -> Number:
    """``c/n``, the one factor by which AdaGN multiplies a gradient; 0 for a gradient of zeros (no division)."""
    factor = at_most(divide(target, norm), range_of(norm).max)  # a denormal norm divides to inf
    return where(norm > 0, factor, 0.0)


def safe_norm(grad: Tensor, grad_max: Tensor) -> Tensor:
    """``‖g‖₂`` by way of ``gmax·‖g/gmax‖``: squares of tiny and huge entries leave float32's range otherwise."""
    scale = torch.where(grad_max > 0, grad_max, torch.ones_like(grad_max))
    return scale * torch.linalg.vector_norm(grad / scale)
