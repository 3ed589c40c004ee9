"""How a new weight, computed in float32, is put into a parameter of fewer bits."""

import torch
from torch import Tensor


def store(target: Tensor, value: Tensor, *, stochastic: bool) -> None:
    """Copy a value into a parameter, to the nearest number of its dtype or, for bfloat16 on request, stochastically."""
    if stochastic and target.dtype == torch.bfloat16 and value.dtype != torch.bfloat16:
        value = stochastic_bfloat16(value.to(torch.float32))
    target.copy_(value)


def stochastic_bfloat16(value: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Round float32 to one of the two neighbouring bfloat16 numbers, so that the mean is the value itself.

    A bfloat16 number is a float32 number whose lower 16 bits are zero. Adding a random number of 16 bits and cutting
    the lower 16 bits off carries into the upper ones with a probability equal to the part cut off.
    What is exact in bfloat16 stays, and so do infinities and ``nan``.

    Args:
        value: float32, any shape.
        generator: source of randomness; default: torch's generator of the device (`torch.manual_seed` seeds it).

    Returns:
        float32 values that bfloat16 represents exactly.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> tiny = torch.full((100_000,), 1 + 2**-10)  # bfloat16 knows 1 and 1 + 2**-7
        >>> tiny.bfloat16().float().mean().item() - 1, round(stochastic_bfloat16(tiny).mean().item() - 1, 4)
        (0.0, 0.001)
    """
    noise = torch.randint(0, 1 << 16, value.shape, dtype=torch.int32, device=value.device, generator=generator)
    rounded = ((value.contiguous().view(torch.int32) + noise) & -65536).view(torch.float32)
    return torch.where(value.isfinite(), rounded, value)
