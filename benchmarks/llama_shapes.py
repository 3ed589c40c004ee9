"""The parameter shapes of Llama models, for benchmarks that need tensors of the right shapes and no model."""

# vocabulary, width, feed-forward width, layers; from 60m on the models of the GaLore and Stable-SPAM papers
SIZES = {
    "4m": (4000, 256, 688, 2),
    "33m": (7970, 512, 1376, 8),
    "60m": (32000, 512, 1376, 8),
    "130m": (32000, 768, 2048, 12),
    "350m": (32000, 1024, 2736, 24),
    "1b": (32000, 2048, 5461, 24),
    "7b": (32000, 4096, 11008, 32),
}
OF_THE_PAPERS = tuple(SIZES)[2:]


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
