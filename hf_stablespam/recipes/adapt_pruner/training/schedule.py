"""One learning rate schedule over the optimizers of all stages."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments, get_scheduler

_WSD = "warmup_stable_decay"


def schedule_of_run(args: TrainingArguments, optimizer: Optimizer, total: int, done: int) -> LambdaLR:
    """The schedule of a run of `total` steps, for a new optimizer that goes on after `done` of them.

    ``lr_scheduler_type="warmup_stable_decay"`` is constant to 90 % of the run and then falls linearly, as published,
    unless ``lr_scheduler_kwargs`` say otherwise (``min_lr_ratio`` is theirs too).

    Args:
        args: with the schedule's type, its options and its warm-up.
        optimizer: of this stage.
        total: update steps of all stages.
        done: those of the stages before.

    Raises:
        ValueError: a schedule whose rate does not follow from the step alone.
    """
    options: dict[str, Any] = dict(args.lr_scheduler_kwargs or {})  # type: ignore[arg-type]
    if getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type) == _WSD:
        options = {"num_decay_steps": total - int(0.9 * total), "decay_type": "linear", **options}
    scheduler = get_scheduler(
        args.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=args.get_warmup_steps(total),
        num_training_steps=total,
        scheduler_specific_kwargs=options or None,
    )
    continue_schedule(scheduler, done)
    return scheduler


def check_schedule(args: TrainingArguments, total: int) -> None:
    """Raise before anything is cut if the schedule cannot be continued; arguments and errors of `schedule_of_run`."""
    schedule_of_run(args, SGD([Parameter(torch.zeros(()))], lr=args.learning_rate), total, 0)


def continue_schedule(scheduler: LambdaLR, done: int) -> None:
    """Let a schedule go on as if `done` steps had been made.

    Raises:
        ValueError: it is none whose rate follows from the step alone.
    """
    if not isinstance(scheduler, LambdaLR):
        raise ValueError(
            f"lr_scheduler_type must be one whose rate follows from the step alone, got {type(scheduler).__name__}; use"
            " warmup_stable_decay, cosine or linear"
        )
    scheduler.last_epoch = done
    rates = [base * rate(done) for base, rate in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
