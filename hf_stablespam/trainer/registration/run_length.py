"""`decay_steps="auto"`: the decay spans the run, as soon as somebody knows how long that is."""

import logging
from typing import Any

logger = logging.getLogger(__name__)

AUTO = "auto"
_SPANS_RUN = "decay_spans_run"  # in a group: its `decay_steps` came from here, and a new run makes a new one


def resolve_decay_steps(optimizer: Any, num_training_steps: int, done: int = 0) -> None:
    """Give groups that were made with `decay_steps="auto"` the number of update steps of the run.

    A second `train()` of the same Trainer, or another try with a smaller batch, goes on with the optimizer as it is:
    its own count, which is never reset, has then begun, and the decay spans what was done and what is to come.
    A run that goes on from a checkpoint keeps the decay that it began with, and says so where the length is another.

    Args:
        optimizer: of the run, wrapped by accelerate or not. Others than `StableSPAM` have no such groups.
        num_training_steps: update steps of the run, those before a resume included.
        done: update steps of this run that lie behind: the `global_step` of a resumed run.
    """
    # What stands for one of DeepSpeed's has no groups.
    groups = [group for group in getattr(optimizer, "param_groups", []) if _spans_run(group)]
    unknown = [group for group in groups if group["decay_steps"] == AUTO]
    total = num_training_steps + max(_steps_taken(optimizer) - done, 0) if groups else num_training_steps
    for group in groups if done == 0 else unknown:
        group["decay_steps"], group[_SPANS_RUN] = total, True
    kept = {group["decay_steps"] for group in groups} - {total}
    if kept:
        logger.warning(
            "the decay of beta1 and gamma1 spans %s update steps, as when this run began, and the run is now %s long; "
            "the checkpoint's decay_steps count",
            ", ".join(map(str, sorted(kept))),
            num_training_steps,
        )


def _spans_run(group: dict[str, Any]) -> bool:
    return group.get("decay_steps") == AUTO or bool(group.get(_SPANS_RUN))


def _steps_taken(optimizer: Any) -> int:
    """The optimizer's own count, read back from the device."""
    return int(max((float(state["step"]) for state in optimizer.state.values() if "step" in state), default=0))
