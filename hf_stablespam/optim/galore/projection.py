"""GaLore's projection of a gradient matrix to a few of its directions, as functions of tensors."""

import torch
from torch import Tensor

PROJECTION_TYPES = ("std", "reverse_std", "left", "right", "full")


def projected_sides(shape: torch.Size, proj_type: str) -> tuple[bool, bool]:
    """Whether a matrix of this shape is projected from the left (its rows), and from the right (its columns).

    "std" shortens the longer rows or columns' partner as GaLore's paper does: with at least as many rows as columns
    the right side, else the left one. "reverse_std" is the other way round, "full" is both.

    Example:
        >>> projected_sides(torch.Size([8, 4]), "std"), projected_sides(torch.Size([4, 8]), "std")
        ((False, True), (True, False))
    """
    tall = shape[0] >= shape[1]
    return {
        "std": (not tall, tall),
        "reverse_std": (tall, not tall),
        "left": (True, False),
        "right": (False, True),
        "full": (True, True),
    }[proj_type]


def projected_shape(shape: torch.Size, rank: int, proj_type: str) -> torch.Size:
    """The shape of ``R``; the rank is at most the smaller side of the matrix.

    Example:
        >>> projected_shape(torch.Size([8, 4]), 2, "std")
        torch.Size([8, 2])
    """
    rank = min(rank, *shape)
    left, right = projected_sides(shape, proj_type)
    return torch.Size([rank if left else shape[0], rank if right else shape[1]])


def principal_directions(grad: Tensor, rank: int, proj_type: str) -> tuple[Tensor | None, Tensor | None]:
    """The directions in which a finite gradient is largest, from its singular value decomposition in float32.

    ``G = U·S·Vᵀ``; ``L = U[:, :r]`` (m, r), ``P = Vᵀ[:r, :]`` (r, n); ``None`` for a side that is not projected.
    """
    left, right = projected_sides(grad.shape, proj_type)
    u, _, vh = torch.linalg.svd(grad.to(torch.float32), full_matrices=False)
    return u[:, :rank] if left else None, vh[:rank] if right else None


def project(grad: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """``R = Lᵀ·G·Pᵀ``, a side that is ``None`` left as it is; in the dtype of ``grad``."""
    low = grad if left is None else left.to(grad.dtype).t() @ grad
    return low if right is None else low @ right.to(grad.dtype).t()


def project_back(low: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """``L·R·P``, a side that is ``None`` left as it is; in the dtype of ``low``."""
    full = low if left is None else left.to(low.dtype) @ low
    return full if right is None else full @ right.to(low.dtype)
