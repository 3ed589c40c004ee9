"""Begin any optimizer's state anew in the middle of a run, and try beforehand that this is all of it.

What an optimizer remembers of the steps before may be anywhere: in the state of its parameters, in counters that it
keeps in its parameter groups (`schedulefree`, pytorch_optimizer) or in attributes of its own. No list of names holds
all of them. So the state is thrown away, the optimizer makes it anew as before its first step, and everything else that
a step changes gets back its value from before the first step. What that is, and whether the optimizer then goes on like
a new one, is found out before training, by a rehearsal on small tensors (`rehearsal.py`).
"""

import contextlib
from typing import Any

from hf_stablespam.trainer.callbacks.helpers.moment_resets.rehearsal import NothingKeptError, rehearse
from hf_stablespam.trainer.callbacks.helpers.remembered import Remembered, begin_anew, remembered
from hf_stablespam.trainer.callbacks.helpers.unwrapping import unwrap

_RESTART = "_hf_stablespam_restart"


class Restart:
    """Resets the moments of an optimizer, whatever they are called and wherever they are.

    Args:
        optimizer: the Trainer's, wrapped by accelerate or not, before its first step and before a checkpoint is loaded
            into it; one that keeps everything in its `state`, as torch's do, at any time.

    Raises:
        ValueError: it keeps nothing from one step to the next, or goes on differently from a new one after a reset, or
            it cannot be tried.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.Adam([weight])
        >>> restart = Restart(optimizer)
        >>> weight.grad = torch.ones(2)
        >>> optimizer.step()
        >>> restart.reset()
        >>> len(optimizer.state)
        0
    """

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = unwrap(optimizer)
        self.resets = 0  # so far, whoever asked for them
        self._fresh: Remembered | None = None
        if not hasattr(self.optimizer, "reset_moments"):  # ours do it themselves, and keep what is no moment
            changes = rehearse(self.optimizer)
            if self.optimizer.state and (kept := changes.group_keys | changes.attributes):
                raise ValueError(
                    f"MomentumResetCallback must see {type(self.optimizer).__name__} before its first step, because it "
                    f"keeps {', '.join(sorted(kept))} outside of its state; give the Trainer a new optimizer"
                )
            self._fresh = remembered(self.optimizer, changes)

    def reset(self) -> None:
        """Forget all steps so far; AdaClip's and AdaGN's trackers, which are no moments, stay."""
        self.resets += 1
        if self._fresh is None:
            self.optimizer.reset_moments()
        else:
            begin_anew(self.optimizer, self._fresh)


def restart_of(optimizer: Any) -> Restart:
    """The one `Restart` of an optimizer, made at the first call.

    Raises:
        ValueError: from `Restart`.
    """
    inner = unwrap(optimizer)
    if getattr(inner, _RESTART, None) is None or getattr(inner, _RESTART).optimizer is not inner:
        setattr(inner, _RESTART, Restart(inner))
    return getattr(inner, _RESTART)


def learn_to_reset(optimizer: Any) -> None:
    """Try, before training and before a checkpoint is loaded, what `reset_moments` will do.

    Raises:
        ValueError: from `Restart`, but not for an optimizer that keeps nothing.
    """
    with contextlib.suppress(NothingKeptError):
        restart_of(optimizer)


def reset_moments(optimizer: Any) -> None:
    """Reset an optimizer that may be one that keeps nothing, where there is nothing to do.

    Raises:
        ValueError: from `Restart`, but not for that.
    """
    with contextlib.suppress(NothingKeptError):
        restart_of(optimizer).reset()
