"""Before DPO's first step the reference must compute what the policy does."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

TOLERANCE = 1e-3  # of the first loss: bfloat16 sums in another order differ by less


def check_reference(trainer: Any) -> None:
    """Raise unless policy and reference compute the same: then the DPO loss before the first step is w · ln 2.

    w is the loss's own of ``loss_weights``, 1 without them. The routers' loss of a mixture of experts, which TRL adds,
    is left out.

    Raises:
        ValueError: the loss of a few rows is something else.
    """
    args = trainer.args
    if args.precompute_ref_log_probs:
        return  # the policy itself has just been the reference
    if not set(args.loss_type) <= {"sigmoid", "sigmoid_norm"} or len(args.loss_type) > 1 or args.use_weighting:
        return  # other losses begin elsewhere
    weight = (args.loss_weights or [1.0])[0]
    rows = trainer.train_dataset.select(range(min(len(trainer.train_dataset), args.per_device_eval_batch_size)))
    with _without_router_loss(trainer):
        loss = trainer.evaluate(rows, metric_key_prefix="reference")["reference_loss"]
    if not abs(loss - weight * math.log(2)) <= TOLERANCE * abs(weight):
        wanted = "ln 2" if weight == 1 else f"{weight:g} · ln 2"
        raise ValueError(
            f"the DPO loss before the first step must be {wanted} = {weight * math.log(2):.4f}, got {loss:.4f}: the"
            " reference does not compute what the policy does; convert both to 4 bits with the same configuration, or"
            " neither"
        )


@contextmanager
def _without_router_loss(trainer: Any) -> Iterator[None]:
    """DPO's loss alone, without the one that keeps the experts of a mixture in balance."""
    before = getattr(trainer, "aux_loss_enabled", False)
    trainer.aux_loss_enabled = False
    try:
        yield
    finally:
        trainer.aux_loss_enabled = before


class ChecksReference(TrainerCallback):
    """`check_reference` before the first step of a run: only then FSDP2 has wrapped the policy."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        if state.global_step == 0:
            check_reference(self.trainer)
