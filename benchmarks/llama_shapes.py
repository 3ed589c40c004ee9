"""The parameter shapes of Llama models, for benchmarks that need tensors of the right shapes and no model."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from model_sizes import SHAPES

OF_THE_PAPERS = ("60m", "130m", "350m", "1b", "7b")  # of GaLore and Stable-SPAM
# vocabulary, width, feed-forward width, layers
SIZES = {
    "4m": (1200, 192, 512, 8),
    "33m": (7970, 512, 1376, 8),
    **{size: (32000, *SHAPES[size][:3]) for size in OF_THE_PAPERS if size in SHAPES},
    "7b": (32000, 4096, 11008, 32),
}


def width_of(size: str) -> int:
    """The model's hidden size."""
    return SIZES[size][1]


def linear_shapes(size: str) -> list[tuple[int, ...]]:
    """The attention and MLP weights of one layer."""
    _, width, inner, _ = SIZES[size]
    return [(width, width)] * 4 + [(inner, width)] * 2 + [(width, inner)]


def llama_shapes(size: str) -> list[tuple[int, ...]]:
    """All parameters in their order, the head not tied to the embedding."""
    vocabulary, width, _, layers = SIZES[size]
    block = [*linear_shapes(size), (width,), (width,)]
    return [(vocabulary, width), *block * layers, (width,), (vocabulary, width)]


def target_shapes(size: str) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """The attention and MLP weights, which GaLore projects, and everything else."""
    linear = linear_shapes(size)
    shapes = llama_shapes(size)
    return [shape for shape in shapes if shape in linear], [shape for shape in shapes if shape not in linear]
