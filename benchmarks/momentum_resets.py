"""Resets of the moments under every `optim` of transformers that runs here and 22 optimizers of pytorch_optimizer.

    python benchmarks/momentum_resets.py            # append rows to results/momentum_resets.csv
    python benchmarks/evidence_page.py              # then: the table of docs/momentum_reset.md

A network of two linear layers learns a linear map. After 200 steps the moments are reset as `MomentumResetCallback`
does it, and the sizes of the next ten updates are compared with those of a new optimizer on a copy of the network,
which sees the same batches.
"""

import argparse
import csv
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import transformers
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

import hf_stablespam  # noqa: F401 (registers its own names)
from benchmarks._record import RESULTS, append_rows
from hf_stablespam.trainer.callbacks.helpers.moment_resets.restart import Restart

STEPS, AFTER, WIDTH, BATCH = 200, 10, 64, 32
OURS = ("spam", "stable_spam")
PEERS = (
    *("adabelief", "adabound", "adai", "adamp", "adan", "ademamix", "adopt", "asgd", "came", "diffgrad", "lamb"),
    *(
        "laprop",
        "lion",
        "madgrad",
        "mars",
        "novograd",
        "prodigy",
        "ranger",
        "schedulefreeadamw",
        "soap",
        "tiger",
        "yogi",
    ),
)
Make = Callable[[nn.Module], Any]


class DoesNotRun(Exception):
    """The optimizer needs what is not here."""


class Found(NamedTuple):
    """Sizes of updates (L2 norms over all weights)."""

    before: float  # of the last one before the reset
    after: list[float]  # of the first ones after it
    new: list[float]  # of the first ones of a new optimizer


def names() -> dict[str, Make]:
    """Name → what makes the optimizer for a network."""
    found: dict[str, Make] = {name.value: _of_transformers(name.value) for name in OptimizerNames}
    return found | {f"pytorch_optimizer {name}": _of_pytorch_optimizer(name) for name in PEERS}


def trial(make: Make, steps: int = STEPS) -> Found:
    """Train, reset, and compare.

    Raises:
        DoesNotRun: not on this machine.
        ValueError: the reset is refused.
    """
    model = _network()
    optimizer = _runs(make, model)
    restart = Restart(optimizer)
    sizes = _train(model, optimizer, range(steps))
    twin = _network()
    twin.load_state_dict(model.state_dict())
    restart.reset()
    after, new = (_train(*pair, range(steps, steps + AFTER)) for pair in ((model, optimizer), (twin, make(twin))))
    return Found(sizes[-1], after, new)


def row(name: str, make: Make) -> dict[str, Any]:
    """What the table says of an optimizer."""
    try:
        found = trial(make)
    except DoesNotRun as error:
        return {"optimizer": name, "verdict": f"does not run here: {error}"}
    except ValueError as error:
        return {"optimizer": name, "verdict": "refused: " + _reason(str(error))}
    ratios = [a / b for a, b in zip(found.after, found.new, strict=True) if b > 0]
    return {
        "optimizer": name,
        "verdict": "reset",
        "first_over_last": f"{found.after[0] / found.before:.3g}",
        "new_over_last": f"{found.new[0] / found.before:.3g}",
        "furthest_from_new": f"{max(ratios, key=lambda ratio: max(ratio, 1 / ratio)):.4g}",
    }


def table(rows: list[dict[str, str]]) -> str:
    """Markdown: the newest row of each optimizer."""
    newest = {one["optimizer"]: one for one in rows}
    lines = [
        "| optimizer | first update after the reset, of the last before | a new optimizer's | ten updates |",
        "|---|---|---|---|",
    ]
    others: dict[str, list[str]] = {}
    for name, one in newest.items():
        if one["verdict"] == "reset":
            cells = (name, one["first_over_last"], one["new_over_last"], one["furthest_from_new"])
            lines.append(f"| {' | '.join(cells)} |")
        else:
            others.setdefault(one["verdict"], []).append(f"`{name}`")
    notes = [f"* {', '.join(members)}: {verdict}." for verdict, members in others.items()]
    return "\n".join([*lines, "", *notes])


def read(path: Path = RESULTS / "momentum_resets.csv") -> list[dict[str, str]]:
    """The rows on record."""
    return list(csv.DictReader(path.open(newline=""))) if path.exists() else []


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))


def _train(model: nn.Module, optimizer: Any, steps: range) -> list[float]:
    target = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1)) / WIDTH**0.5
    if hasattr(optimizer, "train"):
        optimizer.train()
    sizes = []
    for step in steps:
        x = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(2 + step))
        before = [param.detach().clone() for param in model.parameters()]
        (model(x) - x @ target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        moved = [param.detach() - old for param, old in zip(model.parameters(), before, strict=True)]
        sizes.append(torch.stack([part.norm() for part in moved]).norm().item())
    return sizes


def _of_transformers(name: str) -> Make:
    low_rank = "galore" in name or "apollo" in name
    options = {"optim_target_modules": "all-linear", "optim_args": "rank=16"} if low_rank else {}
    if name in OURS:
        options = {"optim_args": "reset_interval=none" + (",decay_steps=none" if name == "stable_spam" else "")}

    def make(model: nn.Module) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            args = TrainingArguments(
                folder, optim=name, learning_rate=1e-3, report_to=[], use_cpu=True, max_grad_norm=0, **options
            )
            cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
        # As `create_optimizer` does; layerwise ones bring their own.
        params = kwargs.pop("optimizer_dict", None) or kwargs.pop("params", None) or kwargs.pop("model", None)
        return cls(model.parameters() if params is None else params, **kwargs)

    return make


def _of_pytorch_optimizer(name: str) -> Make:
    def make(model: nn.Module) -> Any:
        import pytorch_optimizer

        return pytorch_optimizer.load_optimizer(name)(model.parameters(), lr=1e-3)

    return make


def _runs(make: Make, model: nn.Module) -> Any:
    """The optimizer, after another one has trained a network of its own for two steps."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            other = _network()
            _train(other, make(other), range(2))
            return make(model)
    except Exception as error:
        text = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DoesNotRun(text[:80].rstrip(".")) from error


def _reason(message: str) -> str:
    if "keeps moments" in message:
        return "it keeps nothing from one step to the next"
    reason = message.partition("cannot be made to ")[2].partition("; remove")[0]
    return reason.replace("go on", "it does not go on")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these optimizers; default all")
    parser.add_argument("--dry-run", action="store_true", help="print rows instead of appending them")
    options = parser.parse_args(arguments)
    rows = []
    with torch.compiler.set_stance("force_eager"):  # compiling takes longer than all the rest
        for name, make in names().items():
            if options.only is None or name in options.only:
                rows.append({**row(name, make), "transformers": transformers.__version__})
                print(*rows[-1].values(), flush=True)
    if not options.dry_run:
        append_rows("momentum_resets", rows)


if __name__ == "__main__":
    main()
