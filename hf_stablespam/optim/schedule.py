"""The decay ``s`` that shrinks β1 and γ1 over a run, in closed form."""

import math

from hf_stablespam.optim.numbers import Number, at_most, cos


def cosine_decay(step: Number, decay_steps: int | str | None, decay_floor: float) -> Number:
    r"""Factor that multiplies β1 and γ1 at ``step``: a cosine from 1 to ``decay_floor`` that stays there.

    .. math:: s(t) = f + (1 - f)\,\frac{1 + \cos\left(\pi\,\min(t, D+1)/(D+1)\right)}{2}

    Args:
        step: steps taken, ``t = 1, 2, …``; a tensor of any shape, or a number.
        decay_steps: ``D``, in optimizer steps (``total_T`` in the official code); ``None`` for no decay.
        decay_floor: ``f``, the value at the end, in [0, 1] (0.5 in the paper's code).

    Returns:
        A value of the kind of ``step``, or the number 1.0 when ``decay_steps`` is ``None``.

    Example:
        >>> import torch
        >>> cosine_decay(torch.tensor([0.0, 50.5, 101.0, 500.0]), 100, 0.5)
        tensor([1.0000, 0.7500, 0.5000, 0.5000])
    """
    if decay_steps is None or decay_steps == "auto":  # "auto" until the length of the run is known
        return 1.0
    period = int(decay_steps) + 1
    cosine = cos(at_most(step, float(period)) * (math.pi / period))
    return decay_floor + (1 - decay_floor) * (1 + cosine) / 2
