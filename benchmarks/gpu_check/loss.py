"""Loss over tokens of the 60M Llama in bfloat16 on the installed packages' sources, for what is left of the time."""

from __future__ import annotations

import sysconfig
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check.common import DEVICE, Check, by_triton, synchronize
from benchmarks.gpu_check.training import llama, optimizer_for
from hf_stablespam import FourBitConfig, convert_to_4bit

RUNS: dict[str, FourBitConfig | None] = {
    "AdamW + clipping, bfloat16": None,
    "AdamW + clipping, int4": FourBitConfig(fused=True),
    "Stable-SPAM, int4": FourBitConfig(fused=True),
}
LR, WARM_UP, BATCH, LENGTH = 1e-3, 100, 64, 512


def installed_bytes(limit: int) -> torch.Tensor:
    """The sources of the installed packages, one after another in the order of their paths."""
    found, count = [], 0
    for path in sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*.py")):
        text = path.read_bytes()
        found.append(
            torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)
        )
        count += len(text)
        if count > limit:
            break
    return torch.cat(found)


def main(check: Check) -> None:
    """Each run gets an equal part of the time that is left; a row every so often."""
    batch, length, model = (2, 32, "rehearsal") if check.rehearsal else (BATCH, LENGTH, "60m")
    data = installed_bytes(200_000 if check.rehearsal else 300_000_000).to(DEVICE)
    held_out, train = data[: 64 * length], data[64 * length :]
    share = min(120.0, check.seconds_left() / len(RUNS)) if not check.rehearsal else 0.5
    for name, config in RUNS.items():
        with check.trying(check="loss", run=name), by_triton() as options:
            network = llama(model, vocabulary=256, length=length)
            how = {"seconds": share, "batch": batch, "options": options}
            one_run(check, name, network, config, train, held_out.view(64, length), how)


def one_run(
    check: Check, name: str, model: Any, config: FourBitConfig | None, train: Any, held_out: Any, how: dict[str, Any]
) -> None:
    """Train for a while, and evaluate ten times on the way."""
    if config is not None:
        convert_to_4bit(model, config)
    optimizer = optimizer_for(name, model.parameters(), LR, how["options"])
    generator, length = torch.Generator(DEVICE).manual_seed(0), held_out.shape[1]
    start, step, due = time.monotonic(), 0, 0.0
    while (passed := time.monotonic() - start) < how["seconds"]:
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1.0, (step + 1) / WARM_UP)
        places = torch.randint(len(train) - length, (how["batch"], 1), generator=generator, device=DEVICE)
        tokens = train[places + torch.arange(length, device=DEVICE)].long()
        model(tokens, labels=tokens).loss.backward()
        if name.startswith("AdamW"):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if passed >= due:
            due += how["seconds"] / 10
            synchronize()
            row = {"tokens": step * tokens.numel(), "run_seconds": round(time.monotonic() - start, 1)}
            check.row(check="loss", run=name, **row, loss=round(evaluate(model, held_out), 4))
    row = {"tokens": step * how["batch"] * length, "run_seconds": round(time.monotonic() - start, 1)}
    check.row(check="loss", run=name, **row, loss=round(evaluate(model, held_out), 4), last=1)


@torch.no_grad()
def evaluate(model: Any, held_out: Any) -> float:
    """Mean loss on the held-out bytes."""
    parts = [model(part.long(), labels=part.long()).loss for part in held_out.split(16)]
    return float(torch.stack(parts).mean())
