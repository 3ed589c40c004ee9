"""Random Hadamard transform along the last dimension, block by block.

Both operands of a GEMM are multiplied by the same orthogonal matrix along the dimension that the GEMM sums over,
so the product stays the same, while a single large number is spread over its block before it is quantized.
"""

from __future__ import annotations

import torch
from torch import Tensor

_made: dict[tuple, Tensor] = {}


@torch.compiler.assume_constant_result
def _matrix(size: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(size, size) orthogonal: a diagonal of random signs times the Hadamard matrix over the root of `size`."""
    key = (size, seed, dtype, device)
    if key not in _made:
        with torch.inference_mode(False):
            _made[key] = _make(size, seed).to(dtype=dtype, device=device)
    return _made[key]


def _make(size: int, seed: int) -> Tensor:
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while hadamard.shape[0] < size:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size, 1), generator=generator) * 2 - 1
    return signs * hadamard / size**0.5


def hadamard_transform(x: Tensor, size: int, seed: int = 0, inverse: bool = False) -> Tensor:
    """Transform every `size` numbers along the last dimension; a remainder of a row stays as it is.

    Args:
        x: (..., width) numbers.
        size: numbers in a block, a power of two.
        seed: seed of the random signs; two operands must use the same.
        inverse: undo the transform.

    Example:
        >>> x = torch.randn(3, 40, dtype=torch.float64)
        >>> y = hadamard_transform(x, 16)
        >>> torch.allclose(y @ y.T, x @ x.T), torch.equal(y[:, 32:], x[:, 32:])
        (True, True)
    """
    matrix = _matrix(size, seed, x.dtype, x.device)
    if inverse:
        matrix = matrix.t()
    whole = x.shape[-1] // size * size
    turned = (x[..., :whole].unflatten(-1, (-1, size)) @ matrix).flatten(-2)
    return turned if whole == x.shape[-1] else torch.cat([turned, x[..., whole:]], dim=-1)
