"""What training a 1B and a 7B Llama costs, on paper: memory from the bytes of the states, time from the FLOPs.

    python benchmarks/cost_on_paper.py

Memory: bfloat16 weights and gradients (2 bytes each a parameter) and the bytes of optimizer state that
`optimizer_memory.py` counts; activations come on top. Layer-wise GaLore keeps one gradient at a time. Time: 6 FLOPs a
parameter and token for the matrix products (the attention's own products and the 4-bit simulation come on top), on a
GPU of 989 TFLOP/s (the data sheet's dense bfloat16 peak of an H100 or H200) of which 40 % are reached: an assumption.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.optimizer_memory import measure
from benchmarks.quality_tables import markdown

TOKENS = {"1b": 11.6e9, "7b": 19.7e9}  # the Stable-SPAM paper's 1B run, the GaLore paper's 7B run
PEAK, REACHED = 989e12, 0.4
SHOWN = (
    "torch.optim.AdamW",
    "StableSPAM",
    "StableSPAM state_bits=8",
    "StableSPAM state_bits=4",
    "StableSPAM rank=hidden/4",
    "StableSPAM rank=hidden/4 state_bits=8",
)


def gpu_hours(parameters: float, tokens: float) -> float:
    """Hours of one such GPU for 6·N·T FLOPs."""
    return 6 * parameters * tokens / (PEAK * REACHED) / 3600


def cost_table() -> str:
    """A row for each size and optimizer."""
    rows = []
    for size, tokens in TOKENS.items():
        for row in measure(size, torch.bfloat16):
            if row["optimizer"] in SHOWN:
                weights, gradients, states = 2 * row["parameters"], row["gradient_bytes"], row["state_bytes"]
                layerwise = weights + row["gradient_bytes_layerwise"] + states
                rows.append(
                    (
                        f"{size.upper()}, {row['parameters'] / 1e9:.2f}B",
                        f"`{row['optimizer']}`",
                        f"{states / 1e9:.1f}",
                        f"{(weights + gradients + states) / 1e9:.1f}",
                        f"{layerwise / 1e9:.1f}" if "rank" in row["optimizer"] else "–",
                        f"{tokens / 1e9:.1f}B",
                        f"{gpu_hours(row['parameters'], tokens):.0f}",
                    )
                )
    columns = (
        "model",
        "optimizer",
        "states GB",
        "with weights and gradients GB",
        "layer-wise GB",
        "tokens",
        "GPU hours",
    )
    return markdown(columns, rows)


if __name__ == "__main__":
    print(cost_table())
