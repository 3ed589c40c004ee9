"""Adapt-Pruner on a small Llama over bytes: uniform and adaptive cuts, in one and in five stages, and from scratch.

    python benchmarks/prune_and_recover.py --seeds 0 1 2

The model of `examples/prune_and_recover.py`, pretrained, cut to half of its parameters and trained again, equally long
by every method. One row of `results/prune_and_recover.csv` for each method and seed; what is on record is not repeated.
"""

import argparse
import csv
import sys
from pathlib import Path

from _record import RESULTS, append_rows
from transformers import set_seed

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import prune_and_recover as example

NAME = "prune_and_recover"


def on_record() -> set[tuple[str, str, str]]:
    """Method, stages and seed of what has been run."""
    path = RESULTS / f"{NAME}.csv"
    rows = csv.DictReader(path.open(newline="")) if path.exists() else []
    return {(row["method"], row["stages"], row["seed"]) for row in rows}


def record(method: str, figures: dict, options: argparse.Namespace) -> None:
    """One row."""
    row = {
        "method": method,
        "stages": options.stages,
        "seed": options.seed,
        "target": options.target,
        "pretraining_steps": options.pretraining_steps,
        "recovery_steps": options.recovery_steps,
        "four_bit": options.four_bit,
        "parameters": figures["parameters"],
        "loss_after_cut": round(figures["cut"], 4) if "cut" in figures else "",
        "loss": round(figures["recovered"], 4),
        "intermediate_sizes": " ".join(map(str, figures.get("widths", []))),
        "kv_heads": " ".join(map(str, figures.get("kv_heads", []))),
    }
    append_rows(NAME, [row])
    print(row, flush=True)


def run_seed(seed: int, stage_counts: list[int], command_line: list[str]) -> None:
    """All methods of one seed that are not on record."""
    options = example.parse([*command_line, "--seed", str(seed)])
    wanted = [(name, stages) for stages in stage_counts for name in example.AMPLITUDE]
    missing = [(name, stages) for name, stages in wanted if (name, str(stages), str(seed)) not in on_record()]
    if not missing:
        return
    set_seed(seed)
    data = example.load_data(options)
    dense = example.new_model(options)
    loss = example.trained(dense, data, options.pretraining_steps, 3e-3, options)
    if ("dense", "1", str(seed)) not in on_record():
        record("dense", {"parameters": sum(p.numel() for p in dense.parameters()), "recovered": loss}, options)
    for method, stages in missing:
        options.stages = stages
        _, figures = example.cut_and_recovered(dense, method, data, options)
        record(method, figures, options)
        if (method, stages) == ("adaptive", 1):
            record("from scratch", example.from_scratch(figures, data, options), options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--stages", nargs="+", type=int, default=[1, 5])
    own, rest = parser.parse_known_args()
    defaults = ["--pretraining_steps", "300", "--recovery_steps", "100", "--output_dir", "runs/benchmark_prune"]
    for seed in own.seeds:
        run_seed(seed, own.stages, [*defaults, *rest])


if __name__ == "__main__":
    main()
