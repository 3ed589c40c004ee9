"""Loading states: what `StableSPAM` saved, and what `torch.optim.AdamW` saved, so that a run can change over midway.

AdamW knows neither trackers nor their options. Its step count goes on, its moments are kept, the trackers start
fresh (``adopted_at`` says at which step, and they are debiased by the gradients that they have seen themselves).
AdamW's moments are in the scale of the raw gradient and ours in that of the normalised one; the first gradient that
comes tells the factor ``f`` between them, and `plan` multiplies ``M`` by ``f`` and ``V`` by ``f²`` in that step.
"""

import logging
from typing import Any

import torch

from hf_stablespam.optim.state.fresh import COUNTERS, MOMENTS, STATE_NAMES, TRACKERS, without_scales

logger = logging.getLogger(__name__)

_ADAMW_NAMES = {"step", *MOMENTS}
_ADAMW_OPTIONS = ("lr", "betas", "eps", "weight_decay", "maximize", "initial_lr", "params", "param_names")


def adopted(state_dict: dict[str, Any], own_groups: list[dict[str, Any]]) -> dict[str, Any]:
    """A state dict that `StableSPAM` can load, from one of its own or one of `torch.optim.AdamW`.

    Args:
        state_dict: as saved; not changed.
        own_groups: the parameter groups of the optimizer that loads it; their options stay where AdamW has none.

    Raises:
        ValueError: for states of any other optimizer, naming what is missing.
    """
    states = state_dict["state"]
    if not any(_is_adamw(state) for state in states.values()):
        _check_complete(states)
        groups = _with_missing_options(state_dict["param_groups"], own_groups)
        states = {index: without_scales(state) for index, state in states.items()}
        return {**state_dict, "state": states, "param_groups": groups}
    for index, state in states.items():
        _check_adamw(index, state)
    for group in state_dict["param_groups"]:
        _check_adamw_group(group)
    steps = max(int(state["step"]) for state in states.values())
    logger.warning(
        "StableSPAM goes on from step %d of an AdamW run: its moments are kept and rescaled at the next step, "
        "the trackers of AdaClip and AdaGN start fresh",
        steps,
    )
    groups = [
        {name: value for name, value in group.items() if name in _ADAMW_OPTIONS} for group in state_dict["param_groups"]
    ]
    return {
        **state_dict,
        "state": {index: _from_adamw(state) for index, state in states.items()},
        "param_groups": _with_missing_options(groups, own_groups),
    }


def _is_adamw(state: dict[str, Any]) -> bool:
    return not set(state) & {*TRACKERS, "moment_step"} and set(state) >= _ADAMW_NAMES


def _with_missing_options(groups: list[dict[str, Any]], own_groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Saved options win; those that were not saved keep their present values."""
    if len(groups) != len(own_groups):
        return groups  # torch's own error says that the numbers of groups differ
    return [
        {**{k: v for k, v in own.items() if k != "params"}, **group}
        for group, own in zip(groups, own_groups, strict=True)
    ]


def _check_complete(states: dict[Any, dict[str, Any]]) -> None:
    for index, state in states.items():
        missing = [name for name in STATE_NAMES if name not in state]
        if missing:
            raise ValueError(
                f"the state of parameter {index} must hold {', '.join(STATE_NAMES)}, or be AdamW's "
                f"(step, exp_avg, exp_avg_sq), but lacks {', '.join(missing)}; it was saved by another optimizer, "
                "so begin a new run from the weights alone"
            )


def _check_adamw(index: Any, state: dict[str, Any]) -> None:
    if "max_exp_avg_sq" in state:
        raise ValueError(
            f"the state of parameter {index} was saved by AdamW with amsgrad=True (it holds max_exp_avg_sq), "
            "which StableSPAM cannot continue; begin a new run from the weights alone"
        )
    if missing := sorted(_ADAMW_NAMES - set(state)):
        raise ValueError(
            f"the state of parameter {index} must hold step, exp_avg, exp_avg_sq like that of the others, "
            f"but lacks {', '.join(missing)}; the checkpoint is incomplete"
        )
    if unknown := sorted(set(state) - _ADAMW_NAMES):
        raise ValueError(
            f"the state of parameter {index} must hold step, exp_avg, exp_avg_sq and no more to be AdamW's, but holds "
            f"{', '.join(unknown)} too; it was saved by another optimizer, so begin a new run from the weights alone"
        )


def _check_adamw_group(group: dict[str, Any]) -> None:
    if group.get("decoupled_weight_decay") is False and group.get("weight_decay", 0) != 0:
        raise ValueError(
            f"weight_decay must be 0 to go on from a run of torch.optim.Adam, got {group['weight_decay']!r}: Adam adds "
            "it to the gradient and StableSPAM decays the weights directly; begin a new run from the weights alone"
        )


def _from_adamw(state: dict[str, Any]) -> dict[str, Any]:
    step = torch.as_tensor(state["step"], dtype=torch.float32)
    zero = torch.zeros((), dtype=torch.float32)
    return {
        **{name: step.clone() for name in COUNTERS},
        **{name: zero.clone() for name in TRACKERS},
        **{name: state[name] for name in MOMENTS},
    }
