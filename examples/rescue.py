"""Rescue a run that AdamW has lost: go on with Stable-SPAM from its last checkpoint before the loss went wrong.

    python examples/rescue.py --output_dir runs/rescue                        # loses a run first, on embedded data
    python examples/rescue.py --output_dir runs/rescued --lost_run runs/mine --model_size 60m --dataset_name ...

All but the options below are those of `pretrain.py`; with `--lost_run` give those that the lost run was started with.
The rescue is one option: `--resume_from_checkpoint` under `--optim stable_spam`. Weights, data order, schedule and
AdamW's moments go on, the trackers of AdaClip and AdaGN begin fresh.

Without `--lost_run` a run of AdamW in 4 bits comes first, in which every 40th step brings infinite gradients of one
weight: AdamW's weights are `nan` from the first of them on. Stable-SPAM meets the same ones, and leaves out each
tensor whose gradient is not finite (with transformers 5 all tensors of such a step, whose norm the Trainer multiplies
them by).
"""

import argparse
import json
import math
import sys
from pathlib import Path

import pretrain
from injected_spikes import SpikeInjector

from hf_stablespam import GradientNormCallback, last_complete_checkpoint

JUMP = 1.0  # nats above the lowest loss so far: the run is lost


def last_good_step(history: list[dict]) -> int | None:
    """The last logged step before the loss stopped being finite or jumped; `None` where it never did."""
    lowest, step = math.inf, 0
    for row in history:
        if "loss" in row:
            if not row["loss"] <= lowest + JUMP:  # nan is not
                return step
            lowest, step = min(lowest, row["loss"]), row["step"]
    return None


def log_history(folder: Path) -> list[dict]:
    """What a run has logged, from the state that it left at its end or in its newest checkpoint."""
    newest = last_complete_checkpoint(folder)
    for place in (folder, newest and Path(newest)):
        if place and (place / "trainer_state.json").exists():
            return json.loads((place / "trainer_state.json").read_text())["log_history"]
    raise SystemExit(f"--lost_run must be a folder with a run of the Trainer, got {folder}, which has no complete one")


def lose(folder: Path, options: list[str], injector: SpikeInjector) -> None:
    """AdamW with the Trainer's own clipping; without the filter the log says when the loss is `nan`."""
    own = ["--optim", "adamw_torch", "--max_grad_norm", "1", "--logging_nan_inf_filter", "False"]
    pretrain.main(["--output_dir", str(folder), *options, *own], [injector])


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/rescue"), help="default runs/rescue")
    parser.add_argument("--lost_run", type=Path, help="folder of a run with checkpoints; default: make one")
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    own, options = parser.parse_known_args(command_line)

    lost, callbacks = own.lost_run or own.output_dir / "adamw", [GradientNormCallback()]
    if own.lost_run is None:
        steps, every = (8, 4) if own.smoke else (100, 40)
        shared = f"--max_steps {steps} --save_steps {every // 2} --logging_steps {max(1, every // 8)} --warmup_steps 2"
        shared += " --learning_rate 3e-3 --per_device_train_batch_size 8 --max_eval_samples 64 --four_bit int4"
        options = [*shared.split(), *options]
        injector = SpikeInjector(every, size=math.inf)
        lose(lost, options, injector)
        callbacks.append(injector)

    history = log_history(lost)
    good = last_good_step(history)
    if good is None:
        raise SystemExit(
            f"--lost_run must have lost its way, but the losses in {lost} never jumped; resume it as it is"
        )
    # That step's loss was computed before its update: a checkpoint of the same step may be spoilt already.
    checkpoint = last_complete_checkpoint(lost, before=max(1, good))
    if checkpoint is None:
        raise SystemExit(f"no complete checkpoint in {lost} is older than step {good}, where the loss was last good")

    rescue = ["--optim", "stable_spam", "--max_grad_norm", "0", "--resume_from_checkpoint", checkpoint]
    pretrain.main([*options, "--output_dir", str(own.output_dir), *rescue], callbacks)
    rescued = log_history(own.output_dir)
    skipped = sum(row.get("gradients/nonfinite", 0) for row in rescued)
    print(f"\nAdamW: the loss was good until step {good}; {last('loss', history)} in the end")
    print(
        f"Stable-SPAM from {checkpoint}: {last('loss', rescued)} in the end; {skipped:.0f} infinite gradients left out"
    )
    print(f"Validation loss: {last('eval_loss', history)} before the rescue, {last('eval_loss', rescued)} after it")


def last(name: str, history: list[dict]) -> str:
    return next((f"{row[name]:.4f}" for row in reversed(history) if name in row), "unknown")


if __name__ == "__main__":
    main(sys.argv[1:])
