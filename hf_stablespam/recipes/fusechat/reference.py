"""Before DPO's first step the reference must compute what the policy does."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

TOLERANCE = 1e-3  # of the first loss: bfloat16 sums in another order differ by less


def check_reference(trainer: Any) -> None:
    """Raise unless policy and reference compute the same: then the DPO loss before the first step is ln 2.

    Raises:
        ValueError: the loss of a few rows is something else.
    """
    if trainer.args.precompute_ref_log_probs:
        return  # the policy itself has just been the reference
    if not set(trainer.args.loss_type) <= {"sigmoid", "sigmoid_norm"} or len(trainer.args.loss_type) > 1:
        return  # other losses begin elsewhere
    rows = trainer.train_dataset.select(range(min(len(trainer.train_dataset), trainer.args.per_device_eval_batch_size)))
    loss = trainer.evaluate(rows, metric_key_prefix="reference")["reference_loss"]
    if not abs(loss - math.log(2)) < TOLERANCE:
        raise ValueError(
            f"the DPO loss before the first step must be ln 2 = {math.log(2):.4f}, got {loss:.4f}: the reference does"
            " not compute what the policy does; convert both to 4 bits with the same configuration, or neither"
        )


class ChecksReference(TrainerCallback):
    """`check_reference` before the first step of a run: only then FSDP2 has wrapped the policy."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        if state.global_step == 0:
            check_reference(self.trainer)
