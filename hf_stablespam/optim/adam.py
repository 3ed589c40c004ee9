"""Adam's moments and the direction that they give, as a function of tensors."""

import torch
from torch import Tensor


def adam_direction(
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    betas: tuple[Tensor | float, float],
    corrections: tuple[Tensor, Tensor],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Adam's direction for one gradient, to be multiplied by the learning rate and subtracted from the weight.

    ``M ← β1·M + (1−β1)·g``,  ``V ← β2·V + (1−β2)·g²``,  ``d = (M/(1−β1ᵏ)) / (√(V/(1−β2ᵏ)) + ε)``

    Args:
        grad: ``g``, any shape.
        exp_avg: ``M`` before this step, shaped like ``grad``.
        exp_avg_sq: ``V`` before this step.
        betas: ``(β1, β2)``, each in [0, 1).
        corrections: ``(1−β1ᵏ, 1−β2ᵏ)``, for ``k`` gradients in the moments, this one included.
        eps: ``ε``. Where it is 0 and a gradient never was anything else, the direction is 0.

    Returns:
        ``d``, the new ``M`` and the new ``V``.

    Example:
        >>> zero, grad = torch.zeros(2), torch.tensor([3.0, -0.1])
        >>> corrections = torch.tensor(0.1), torch.tensor(0.001)
        >>> adam_direction(grad, zero, zero, betas=(0.9, 0.999), corrections=corrections, eps=0.0)[0]
        tensor([ 1.0000, -1.0000])
    """
    beta1, beta2 = betas
    exp_avg = beta1 * exp_avg + (1 - beta1) * grad
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad.square()
    root = (exp_avg_sq / corrections[1]).sqrt() + eps
    return (exp_avg / corrections[0]) / root.clamp(min=torch.finfo(grad.dtype).tiny), exp_avg, exp_avg_sq
