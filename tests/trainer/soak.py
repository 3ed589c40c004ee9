"""A long run of a very small model, with what it costs noted along the way."""

import gc
import json
import multiprocessing
import time
from array import array
from pathlib import Path

import psutil
import torch
from transformers import Trainer, TrainerCallback

from hf_stablespam import FourBitCallback, FourBitConfig, GradientNormCallback, MomentumResetCallback
from tests.trainer.helpers import RandomTokens, arguments, tiny_llama

MEASURE_EVERY = 50
RESULT = "soak.json"


class Meter(TrainerCallback):
    """Memory and open files of this process every so many steps, and the processor time of each step."""

    def __init__(self, steps: int) -> None:
        self.rows: list[dict] = []
        self.process = psutil.Process()
        self.seconds = array("d", [0.0] * steps)  # does not grow
        self.start = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds[state.global_step - 1] = time.process_time() - self.start
        if state.global_step % MEASURE_EVERY == 0:
            gc.collect()
            self.rows.append(
                {
                    "step": state.global_step,
                    "memory": self.process.memory_info().rss,
                    "files": self.process.num_fds(),
                }
            )


def soak(folder: Path, steps: int) -> None:
    """Resets of both kinds, a checkpoint every 250 steps of which two are kept, a log every 10."""
    torch.set_num_threads(1)
    meter = Meter(steps)
    args = arguments(
        folder,
        max_steps=steps,
        logging_steps=10,
        save_strategy="steps",
        save_steps=250,
        save_total_limit=2,
    )
    callbacks = [
        FourBitCallback(FourBitConfig(group_size=8)),
        GradientNormCallback(),
        MomentumResetCallback(every=100, warmup_steps=10),
        meter,
    ]
    trainer = Trainer(model=tiny_llama(), args=args, train_dataset=RandomTokens(rows=256), callbacks=callbacks)
    trainer.train()
    (folder / RESULT).write_text(json.dumps({"rows": meter.rows, "step_seconds": list(meter.seconds)}))


def measured(folder: Path, steps: int) -> dict:
    """The measurements of a soak in a process of its own."""
    process = multiprocessing.get_context("spawn").Process(target=soak, args=(folder, steps))
    process.start()
    process.join()
    assert process.exitcode == 0
    return json.loads((folder / RESULT).read_text())
