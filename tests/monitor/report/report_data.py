"""Folders of runs as the Trainer leaves them, for the tests of the report."""

import json
import math
import random


def log_rows(steps, seed=0, ours=True, blocks=0):
    """A log row for every step, with a spike of the gradient at each fiftieth, and an evaluation at each tenth."""
    source, rows = random.Random(seed), []
    for step in range(1, steps + 1):
        loss = 3 + 4 * math.exp(-4 * step / steps) + source.gauss(0, 0.01)
        norm = math.exp(source.gauss(0, 0.2)) * (50 if step % 50 == 0 else 1)
        row = {"step": step, "epoch": step / steps, "loss": loss, "learning_rate": 1e-3, "grad_norm": norm}
        if ours:
            row |= {"gradients/norm": norm, "gradients/norm_max": norm, "gradients/stable_norm": 1.0}
            row |= {"gradients/clipped": float(step % 7), "gradients/resets": float(step % 100 == 0)}
        row |= {f"gradients/norm/model.layers.{i}": norm * (i + 1) for i in range(blocks)}
        rows.append(row)
        if step % 10 == 0:
            rows.append({"step": step, "epoch": step / steps, "eval_loss": loss + 0.1})
    rows.append({"step": steps, "train_runtime": 10.0 + seed, "train_samples_per_second": 50.0})
    return rows


def write_run(folder, rows=None, **options):
    """A run's folder with a `trainer_state.json`; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = log_rows(**{"steps": 120} | options) if rows is None else rows
    (folder / "trainer_state.json").write_text(json.dumps({"max_steps": 120, "log_history": rows}))
    return folder
