"""Random Hadamard transform along the last dimension, block by block.

Both operands of a GEMM are multiplied by the same orthogonal matrix along the dimension that the GEMM sums over,
so the product stays the same, while a single large number is spread over its block before it is quantized.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

_made: dict[tuple, Tensor] = {}


def random_signs(size: int, seed: int) -> tuple[float, ...]:
    """`size` random signs; plain numbers, so that a compiled graph may hold them."""
    return tuple(random.Random(seed).choices((-1.0, 1.0), k=size))


def _matrix(signs: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Orthogonal: a diagonal of `signs` times the Hadamard matrix over the root of its size."""
    if torch.compiler.is_compiling():
        return _make(signs).to(dtype=dtype, device=device)
    key = (signs, dtype, device)
    if key not in _made:
        with torch.inference_mode(False):
            _made[key] = _make(signs).to(dtype=dtype, device=device)
    return _made[key]


def _make(signs: tuple[float, ...]) -> Tensor:
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while hadamard.shape[0] < len(signs):
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    return torch.tensor(signs, dtype=torch.float64).unsqueeze(1) * hadamard / len(signs) ** 0.5


def hadamard_transform(x: Tensor, signs: tuple[float, ...], inverse: bool = False) -> Tensor:
    """Transform every block of numbers along the last dimension; a remainder of a row stays as it is.

    Args:
        x: (..., width) numbers.
        signs: one random sign for each number of a block (a power of two of them), see `random_signs`; both
            operands of a product must use the same.
        inverse: undo the transform.

    Example:
        >>> x = torch.randn(3, 40, dtype=torch.float64)
        >>> y = hadamard_transform(x, random_signs(16, seed=0))
        >>> torch.allclose(y @ y.T, x @ x.T), torch.equal(y[:, 32:], x[:, 32:])
        (True, True)
    """
    size = len(signs)
    matrix = _matrix(signs, x.dtype, x.device)
    if inverse:
        matrix = matrix.t()
    whole = x.shape[-1] // size * size
    turned = (x[..., :whole].unflatten(-1, (-1, size)) @ matrix).flatten(-2)
    return turned if whole == x.shape[-1] else torch.cat([turned, x[..., whole:]], dim=-1)
