"""What `MomentumResetCallback` may be given, and beside what it may stand."""

import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any

from transformers import TrainerState, TrainingArguments

from hf_stablespam.trainer.registration.options.optim_args import SPAM, STABLE_SPAM, parse_optim_args

logger = logging.getLogger(__name__)


def integer(name: str, value: object, least: int, remedy: str) -> int:
    """`value`, an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}; {remedy}")
    return value


def listed(at: object) -> list[Any]:
    """The single steps to reset at, as a list."""
    if isinstance(at, str) or not isinstance(at, Iterable):
        raise ValueError(f"at must be a list of steps, got {at!r}; write at=[...], or every=... for a regular reset")
    return list(at)


def spike_factor(value: object) -> float | None:
    """`on_spike`, a number above 1 or None."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 < value < math.inf:
        raise ValueError(f"on_spike must be a finite number above 1, got {value!r}; None switches it off")
    return float(value)


def check_sole_owner(callback: object, args: TrainingArguments, state: TrainerState) -> None:
    """Raise where the optimizer, or a second callback of this class, resets as well."""
    optimizer = getattr(args.optim, "value", args.optim)
    ours = optimizer in (STABLE_SPAM, SPAM)
    interval = parse_optim_args(args.optim_args, optimizer).get("reset_interval") if ours else None
    if interval is not None:
        raise ValueError(
            f"optim_args sets reset_interval={interval} beside a MomentumResetCallback, which owns the resets; "
            "leave reset_interval out, or remove the callback"
        )
    places: Any = state.stateful_callbacks
    if isinstance(places.get(type(callback).__name__), list):
        raise ValueError(
            "There are two MomentumResetCallbacks in one Trainer, but resets have one owner; "
            "give the steps of both to one callback, with every= and at="
        )


def say_what_was_missed(steps: Sequence[int], resumed_step: int) -> None:
    """Warn about resets up to a checkpoint whose run had no such callback."""
    missed = [step for step in steps if step <= resumed_step]
    if missed:
        logger.warning(
            "MomentumResetCallback is to reset at step %s, and the run goes on after step %d of one that had no such "
            "callback: that reset never comes",
            ", ".join(map(str, missed)),
            resumed_step,
        )


def say_what_never_comes(steps: Sequence[int], max_steps: int) -> None:
    """Warn about resets that lie behind the end of the run."""
    late = [step for step in steps if step > max_steps > 0]
    if late:
        logger.warning(
            "MomentumResetCallback is to reset at step %s, and the run has %d update steps: that reset never comes",
            ", ".join(map(str, late)),
            max_steps,
        )
