"""What an optimizer keeps: bytes of state for Llama shapes, against torch's AdamW, and gradients alive at a time.

    python benchmarks/optimizer_memory.py       # a table for each size, appended to results/optimizer_memory.csv
    python benchmarks/optimizer_memory.py --sizes 1b --dtype bfloat16 --dry-run

The states are those that the optimizers make, on torch's meta device, so that a 7B model needs no memory. GaLore
projects the attention and MLP weights to a quarter of the hidden size, as its paper does. "layer-wise" updates each
parameter during the backward pass: of the gradients, only the largest is then ever alive.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks._record import append_rows
from benchmarks.llama_shapes import OF_THE_PAPERS, target_shapes, width_of
from hf_stablespam.optim import SPAM, StableSPAM
from hf_stablespam.optim.spam.optimizer import fresh_spam_state
from hf_stablespam.optim.state.fresh import fresh_state


def contestants(width: int) -> dict[str, tuple[Any, dict[str, Any], dict[str, Any]]]:
    """Name → optimizer, its options, and further options of the attention and MLP weights."""
    rank = {"rank": width // 4}
    return {
        "SPAM": (SPAM, {}, {}),
        "SPAM density=0.25": (SPAM, {}, {"density": 0.25}),
        "StableSPAM": (StableSPAM, {}, {}),
        "StableSPAM state_dtype=bfloat16": (StableSPAM, {"state_dtype": torch.bfloat16}, {}),
        "StableSPAM state_bits=8": (StableSPAM, {"state_bits": 8}, {}),
        "StableSPAM state_bits=4": (StableSPAM, {"state_bits": 4}, {}),
        "StableSPAM rank=hidden/4": (StableSPAM, {}, rank),
        "StableSPAM rank=hidden/4 state_bits=8": (StableSPAM, {"state_bits": 8}, rank),
        "StableSPAM rank=hidden/4 state_bits=4": (StableSPAM, {"state_bits": 4}, rank),
    }


def state_bytes(optimizer: Any, options: dict[str, Any], shapes: list[tuple[int, ...]], dtype: torch.dtype) -> int:
    """Bytes of the state that an optimizer makes for parameters of these shapes."""
    total, known = 0, {}
    for shape in shapes:
        if shape not in known:
            param = torch.nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))
            (group,) = optimizer([{"params": [param], **options}]).param_groups
            make = fresh_spam_state if optimizer is SPAM else fresh_state
            known[shape] = sum(map(bytes_of, make(param, group).values()))
        total += known[shape]
    return total


def bytes_of(tensor: Any) -> int:
    """Bytes of a tensor, or of what a low-bit one holds."""
    parts = [getattr(tensor, name) for name in tensor.tensor_attrs] if hasattr(tensor, "codes") else [tensor]
    return sum(part.numel() * part.element_size() for part in parts)


def measure(size: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """One row for each optimizer."""
    targets, others = target_shapes(size)
    parameters = sum(map(math.prod, targets + others))
    adamw = 2 * parameters * dtype.itemsize + 4 * len(targets + others)
    found = {"torch.optim.AdamW": adamw}
    for name, (optimizer, options, of_targets) in contestants(width_of(size)).items():
        of_others = state_bytes(optimizer, options, others, dtype)
        found[name] = of_others + state_bytes(optimizer, {**options, **of_targets}, targets, dtype)
    largest = max(map(math.prod, targets + others))
    return [
        {
            "size": size,
            "dtype": str(dtype).removeprefix("torch."),
            "parameters": parameters,
            "optimizer": name,
            "state_bytes": held,
            "state_bytes_per_parameter": round(held / parameters, 4),
            "below_adamw": round(1 - held / adamw, 4),
            "gradient_bytes": parameters * dtype.itemsize,
            "gradient_bytes_layerwise": largest * dtype.itemsize,
        }
        for name, held in found.items()
    ]


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=OF_THE_PAPERS, default=OF_THE_PAPERS)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the parameters")
    parser.add_argument("--dry-run", action="store_true", help="append nothing to the results")
    arguments = parser.parse_args(command_line)
    for size in arguments.sizes:
        rows = measure(size, getattr(torch, arguments.dtype))
        first = rows[0]
        gradients = first["gradient_bytes"] / 1e9, first["gradient_bytes_layerwise"] / 1e9
        print(f"\n{size}: {first['parameters'] / 1e6:.0f}M parameters in {arguments.dtype}; gradients alive ", end="")
        print(f"{gradients[0]:.2f} GB, layer-wise {gradients[1]:.2f} GB")
        for row in rows:
            name, held, each = row["optimizer"], row["state_bytes"] / 1e9, row["state_bytes_per_parameter"]
            print(f"  {name:40s} {held:7.3f} GB  {each:6.3f} B/parameter  {-100 * row['below_adamw']:+6.1f} %")
        if not arguments.dry_run:
            append_rows("optimizer_memory", rows)


if __name__ == "__main__":
    main()
