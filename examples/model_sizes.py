"""The shapes of the models that `pretrain.py` trains by name, for benchmarks that need no more of it."""

# Hidden size, intermediate size, layers, heads: the paper's models, whose names count a vocabulary of 32,000.
SHAPES = {
    "tiny": (128, 352, 4, 4),
    "moe-tiny": (128, 128, 4, 4),  # a Qwen3-MoE, with this intermediate size in each of 8 experts
    "9m": (128, 352, 4, 4),
    "20m": (256, 688, 4, 4),
    "60m": (512, 1376, 8, 8),
    "130m": (768, 2048, 12, 12),
    "350m": (1024, 2736, 24, 16),
    "1b": (2048, 5461, 24, 32),
}
