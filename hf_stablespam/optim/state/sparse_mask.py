"""Random subsets of a tensor's entries, one bit for each entry."""

import torch
from torch import Tensor

_BITS = 8


def kept_entries(count: int, density: float) -> int:
    """How many of ``count`` entries a mask of ``density`` keeps: the nearest whole number, at least one."""
    return max(1, round(count * density))


def empty_mask(count: int, device: torch.device) -> Tensor:
    """Room for a packed mask of ``count`` entries: ``(⌈count/8⌉,)`` uint8."""
    return torch.zeros(-(-count // _BITS), dtype=torch.uint8, device=device)


def draw_mask(count: int, density: float, seed: int, device: torch.device) -> Tensor:
    """A random mask that keeps exactly `kept_entries`, packed: ``(⌈count/8⌉,)`` uint8, entry 0 in the lowest bit.

    The same seed gives the same mask on the same type of device.

    Example:
        >>> mask = draw_mask(10, 0.3, seed=0, device=torch.device("cpu"))
        >>> mask.shape, mask_indices(mask, 10, 0.3).numel()
        (torch.Size([2]), 3)
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    chosen = torch.randperm(count, generator=generator, device=device)[: kept_entries(count, density)]
    bits = torch.zeros(-(-count // _BITS) * _BITS, dtype=torch.uint8, device=device)
    bits[chosen] = 1
    weights = 2 ** torch.arange(_BITS, dtype=torch.uint8, device=device)
    return (bits.view(-1, _BITS) * weights).sum(dim=1, dtype=torch.uint8)


def mask_indices(mask: Tensor, count: int, density: float) -> Tensor:
    """Where the kept entries are, ascending: ``(kept_entries,)`` int64."""
    shifts = torch.arange(_BITS, dtype=torch.uint8, device=mask.device)
    bits = (mask.unsqueeze(1) >> shifts) & 1
    # Its length is known, and so the host need not wait for the device to count.
    return torch.nonzero_static(bits.view(-1), size=kept_entries(count, density)).view(-1)
