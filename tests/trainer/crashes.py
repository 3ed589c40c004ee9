"""Runs that are killed with SIGKILL at a chosen moment, in processes of their own."""

import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from transformers import Trainer, TrainerCallback, TrainerState, modeling_utils

from hf_stablespam import FourBitCallback, FourBitConfig, GradientNormCallback, last_complete_checkpoint
from tests.processes import FORKSERVER
from tests.trainer.helpers import RandomTokens, arguments, optimizer_of, tiny_llama

STEPS, SAVE_STEPS = 12, 3
CALLBACKS = ("on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end", "on_save")
LOGGED = ("step", "loss", "learning_rate")  # and all of ours
RESULT = "result.pt"


class Killer(TrainerCallback):
    """Ends its process, as a power switch would, at the n-th moment of the kind asked for.

    Args:
        kind: `"training"` (the moments are callback events) or `"writing"` (files of checkpoints, half written).
        countdown: which of these moments; `None` for never.
    """

    def __init__(self, kind: str, countdown: int | None) -> None:
        self.kind, self.countdown = kind, countdown

    def moment(self, kind: str, file: Path | None = None) -> None:
        if self.countdown is None or kind != self.kind:
            return
        self.countdown -= 1
        if self.countdown == 0:
            if file is not None:
                os.truncate(file, file.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def __getattribute__(self, name: str):
        if name in CALLBACKS:
            return lambda *args, **kwargs: self.moment("training")
        return super().__getattribute__(name)

    @contextmanager
    def watching_files(self) -> Iterator[None]:
        """Counts each file of a checkpoint as it has been written."""
        with (
            mock.patch.object(torch, "save", self._then_moment(torch.save, 1)),
            mock.patch.object(modeling_utils, "safe_save_file", self._then_moment(modeling_utils.safe_save_file, 1)),
            mock.patch.object(TrainerState, "save_to_json", self._then_moment(TrainerState.save_to_json, 1)),
        ):
            yield

    def _then_moment(self, write, place: int):
        def written(*args, **kwargs):
            write(*args, **kwargs)
            self.moment("writing", Path(args[place]))

        return written


def attempt(output_dir: Path, kind: str = "training", countdown: int | None = None) -> None:
    """Start the run or go on with it; if it comes to its end, keep weights, optimizer state and losses."""
    torch.set_num_threads(1)
    killer = Killer(kind, countdown)
    trainer = Trainer(
        model=tiny_llama(attention_dropout=0.1),
        args=arguments(
            output_dir,
            max_steps=STEPS,
            save_strategy="steps",
            save_steps=SAVE_STEPS,
            gradient_accumulation_steps=2,
            lr_scheduler_type="cosine",
            optim_args="reset_interval=5",
            weight_decay=0.1,
        ),
        train_dataset=RandomTokens(),
        callbacks=[FourBitCallback(FourBitConfig(group_size=8)), GradientNormCallback(), killer],
    )
    with killer.watching_files():
        trainer.train(resume_from_checkpoint=last_complete_checkpoint(output_dir))
    result = {
        "weights": trainer.model.state_dict(),
        "states": optimizer_of(trainer).state_dict()["state"],
        "options": optimizer_of(trainer).state_dict()["param_groups"],
        "logs": [
            {key: value for key, value in row.items() if key in LOGGED or "/" in key}
            for row in trainer.state.log_history[:-1]
        ],
    }
    torch.save(result, output_dir / RESULT)


def in_new_process(*arguments_of_attempt: object) -> int:
    """Exit code of an attempt; −9 if it was killed."""
    process = FORKSERVER.Process(target=attempt, args=arguments_of_attempt)
    process.start()
    process.join()
    return process.exitcode


def crash_and_resume(output_dir: Path, crashes: int, seed: int) -> Iterator[dict]:
    """Kill a run again and again at random moments, every second time while it writes; then let it finish."""
    randomness = random.Random(seed)
    output_dir.mkdir(parents=True, exist_ok=True)
    for number in range(crashes):
        kind = ("training", "writing")[number % 2]
        countdown = randomness.randint(1, {"training": 40, "writing": 8}[kind])
        before = last_complete_checkpoint(output_dir)
        code = in_new_process(output_dir, kind, countdown)
        folders = sorted(output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        newest = folders[-1] if folders else None
        last = last_complete_checkpoint(output_dir)
        yield {
            "kill": number + 1,
            "during": kind,
            "moment": countdown,
            "exit_code": code,
            "resumed_from": Path(before).name if before else "",
            "newest_is_half_written": newest is not None and str(newest) != last,
        }
        if code == 0:  # the run was over before the moment came: begin another
            for path in folders:
                path.rename(path.with_name(f"run{number}-{path.name}"))
    in_new_process(output_dir)
