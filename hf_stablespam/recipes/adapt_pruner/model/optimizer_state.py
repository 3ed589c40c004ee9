"""New parameters in the place of old ones in an optimizer, with or without the old ones' state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_stablespam.optim.stabilize.stabilizer import Stabilizer
from hf_stablespam.trainer.callbacks.helpers.moment_resets.restart import reset_moments
from hf_stablespam.trainer.callbacks.helpers.unwrapping import unwrap

KEEP, RESET = "keep", "reset"
# AdaGN's history is of the norm of the larger matrix. Of equal entries a share of n has √n of the norm.
_NORM_POWERS = {"norm_mean": 0.5, "norm_sq": 1.0}


def check_choice(optimizer_state: str) -> None:
    """Raise unless the choice is a known one."""
    if optimizer_state not in (KEEP, RESET):
        raise ValueError(f"optimizer_state must be 'reset' or 'keep', got {optimizer_state!r}; 'reset' is the default")


class OptimizerSurgeon:
    """Puts new parameters into an optimizer's groups.

    Args:
        optimizer: of torch or like it, wrapped by accelerate or not; `None` does nothing.
        optimizer_state: ``"reset"`` drops the state of the replaced parameters, and `finish` resets the moments of
            all; ``"keep"`` indexes every state tensor of the parameter's shape like the parameter.

    Raises:
        ValueError: another `optimizer_state`.
    """

    def __init__(self, optimizer: Any, optimizer_state: str = RESET) -> None:
        check_choice(optimizer_state)
        self.optimizer = None if optimizer is None else unwrap(optimizer)
        self.keeps = optimizer_state == KEEP
        self.dropped: list[Tensor] = []  # new parameters whose state could not be kept
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        stabilizer = getattr(self.optimizer, "stabilizer", None)
        self._trackers = stabilizer.trackers() if isinstance(stabilizer, Stabilizer) else {}
        self._places = {id(old): (group["params"], i) for group in groups for i, old in enumerate(group["params"])}

    @torch.no_grad()
    def replace(self, old: nn.Parameter, new: nn.Parameter, select: Callable[[Tensor], Tensor]) -> None:
        """Let `new` take the place of `old`.

        Args:
            select: what made the new tensor out of the old one, for the tensors of its state.
        """
        if self.optimizer is None or id(old) not in self._places:
            return
        params, index = self._places.pop(id(old))
        params[index] = new
        self._places[id(new)] = (params, index)
        share = new.numel() / old.numel()
        trackers = self._trackers.pop(old, None)
        if trackers and self.keeps and (cut := cut_state(trackers, old, select, share)) is not None:
            self._trackers[new] = cut
        state = self.optimizer.state.pop(old, None)
        if not state or not self.keeps:
            return
        cut = cut_state(state, old, select, share)
        if cut is None:
            self.dropped.append(new)
        else:
            self.optimizer.state[new] = cut

    def finish(self) -> None:
        """With ``"reset"``: set the moments of all parameters to where they began."""
        if self.optimizer is not None and not self.keeps:
            reset_moments(self.optimizer)


def cut_state(
    state: dict[str, Any], old: Tensor, select: Callable[[Tensor], Tensor], share: float
) -> dict[str, Any] | None:
    """The state of a parameter after a cut; `None` where a part of it cannot be (quantized, projected, in a list).

    Args:
        state: of the parameter `old`.
        select: what cuts a tensor of its shape.
        share: entries that are left, from 0 to 1.
    """
    result: dict[str, Any] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            if holds_tensors(value):
                return None
            result[name] = value
        elif type(value) in (Tensor, nn.Parameter) and value.shape == old.shape:
            result[name] = select(value).clone()
        elif value.numel() == 1:
            result[name] = value * share ** _NORM_POWERS[name] if name in _NORM_POWERS else value
        else:
            return None
    return result


def holds_tensors(value: Any) -> bool:
    """Whether tensors of more than one entry are in a list, tuple or dictionary, or are attributes of an object."""
    if isinstance(value, Tensor):
        return value.numel() > 1
    if isinstance(value, dict):
        return any(map(holds_tensors, value.values()))
    if isinstance(value, list | tuple | set):
        return any(map(holds_tensors, value))
    return any(isinstance(own, Tensor) and own.numel() > 1 for own in getattr(value, "__dict__", {}).values())
