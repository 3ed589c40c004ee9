"""Adapt-Pruner on a small Llama over bytes: uniform and adaptive cuts, in one and in five stages, and from scratch.

    python benchmarks/prune_and_recover.py  # three seeds, uniform and adaptive, one stage and five
    python benchmarks/prune_and_recover.py --stages 1 --recovery_steps 0 --amplitudes 0 0.005 0.01 0.02
    python benchmarks/prune_and_recover.py --table

The model of `examples/prune_and_recover.py`, pretrained, cut to half of its parameters and trained again, equally long
by every method. One row of `results/prune_and_recover.csv` for each method and seed, as soon as it is known; what is on
record is not repeated, and the pretrained models lie in `--output_dir`.
"""

import argparse
import csv
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import prune_and_recover as example

from benchmarks._record import RESULTS, append_rows

NAME = "prune_and_recover"
ORDER = ("dense", "uniform", "adaptive", "from scratch")  # in the table
# What tells one row from another; all but the seed make a line of the table.
KEY = ("method", "amplitude", "stages", "pretraining_steps", "recovery_steps", "layers", "four_bit", "seed")


def on_record() -> list[dict[str, str]]:
    """The rows that there are."""
    path = RESULTS / f"{NAME}.csv"
    return list(csv.DictReader(path.open(newline=""))) if path.exists() else []


def identity(method: str, options: argparse.Namespace) -> dict[str, Any]:
    """What a row is of."""
    adaptive = method == "adaptive"
    cut = method in example.METHODS
    return {
        "method": method,
        "amplitude": options.amplitude if adaptive else 0.0,
        "stages": options.stages if cut else 0,
        "pretraining_steps": options.pretraining_steps,
        "recovery_steps": 0 if method == "dense" else options.recovery_steps,
        "layers": options.layers,
        "four_bit": options.four_bit,
        "seed": options.seed,
    }


def is_known(row: dict[str, Any]) -> bool:
    """Whether such a row is on record."""
    return any(all(old[name] == str(row[name]) for name in KEY) for old in on_record())


def record(row: dict[str, Any], figures: dict[str, Any]) -> None:
    """One row."""
    row["parameters"] = figures["parameters"]
    for name, key in (("loss_after_cut", "cut"), ("loss", "recovered")):
        row[name] = round(figures[key], 4) if key in figures else ""
    for name, key in (("intermediate_sizes", "widths"), ("kv_heads", "kv_heads")):
        row[name] = " ".join(map(str, figures.get(key, [])))
    append_rows(NAME, [row])
    print(row, flush=True)


def dense_model(data: Any, options: argparse.Namespace) -> Any:
    """The pretrained model of a seed, from its file if it has been made."""
    set_seed(options.seed)
    model = example.new_model(options)
    name = f"dense-{options.layers}-{options.pretraining_steps}-{options.seed}.pt"
    path = Path(options.output_dir) / name
    if path.exists():
        model.load_state_dict(torch.load(path))
        return model
    loss = example.trained(model, data, options.pretraining_steps, 3e-3, options)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    if not is_known(row := identity("dense", options)):
        record(row, {"parameters": sum(p.numel() for p in model.parameters()), "recovered": loss})
    return model


def run(options: argparse.Namespace, data: Any, methods: list[tuple[str, float, int]]) -> None:
    """Every method of one seed that is not on record; the small shape from scratch after the first adaptive cut."""
    for method, options.amplitude, options.stages in methods:
        row = identity(method, options)
        if is_known(row):
            continue
        dense = dense_model(data, options)
        _, figures = example.cut_and_recovered(dense, method, data, options)
        record(row, figures)
        scratch = identity("from scratch", options)
        if method == "adaptive" and options.recovery_steps and not is_known(scratch):
            record(scratch, example.from_scratch(figures, data, options))


def table(rows: list[dict[str, str]]) -> str:
    """Mean and standard deviation over the seeds, as a table of Markdown: one line for each method."""
    lines: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        if row["recovery_steps"] != "0" or row["method"] == "dense":  # else a cut without recovery is on record twice
            lines.setdefault(tuple(row[name] for name in KEY[:-1]), []).append(row)
    shown = ["| method | amplitude | stages | parameters | seeds | after the cut | recovered |"]
    shown.append("|---|---:|---:|---:|---|---:|---:|")
    for (method, amplitude, stages, *_), same in sorted(lines.items(), key=lambda line: ORDER.index(line[0][0])):
        size, seeds = f"{int(same[0]['parameters']):,}", ", ".join(sorted(row["seed"] for row in same))
        plan = f"{amplitude} | {stages}" if method in example.METHODS else "– | –"
        losses = f"{spread(same, 'loss_after_cut') or '–'} | {spread(same, 'loss')}"
        shown.append(f"| {method} | {plan} | {size} | {seeds} | {losses} |")
    return "\n".join(shown)


def spread(rows: list[dict[str, str]], name: str) -> str:
    """Mean ± standard deviation of a column; empty where it is."""
    values = [float(row[name]) for row in rows if row[name]]
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}" if values else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--stages", nargs="+", type=int, default=[1, 5])
    parser.add_argument("--amplitudes", nargs="+", type=float, default=[0.0, 0.02], help="0 is the uniform cut")
    parser.add_argument("--table", action="store_true", help="only show what is on record")
    own, rest = parser.parse_known_args()
    if own.table:
        print(table(on_record()))
        return
    methods = [("adaptive" if one else "uniform", one, stages) for stages in own.stages for one in own.amplitudes]
    for seed in own.seeds:
        defaults = ["--recovery_steps", "300", "--output_dir", "runs/benchmark_prune", "--seed", str(seed)]
        options = example.parse([*defaults, *rest])
        run(options, example.load_data(options), methods)


if __name__ == "__main__":
    main()
