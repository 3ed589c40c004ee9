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
_ANEW = "begin a new run from the weights alone"


def adopted(state_dict: dict[str, Any], own_groups: list[dict[str, Any]]) -> dict[str, Any]:
    """A state dict that `StableSPAM` can load, from one of its own or one of `torch.optim.AdamW`.

    The options in ``own_groups``, those of the optimizer that loads it, stay where AdamW has none. States of any other
    optimizer raise a ValueError that names what is missing.
    """
    states, groups = state_dict["state"], state_dict["param_groups"]
    if any(_is_adamw(state) for state in states.values()):
        for index, state in states.items():
            _check_adamw(index, state)
        for group in groups:
            _check_adamw_group(group)
        logger.warning(
            "StableSPAM goes on from step %d of an AdamW run: its moments are kept and rescaled at the next step, "
            "the trackers of AdaClip and AdaGN start fresh",
            max(int(state["step"]) for state in states.values()),
        )
        states = {index: _from_adamw(state) for index, state in states.items()}
        groups = [{name: value for name, value in group.items() if name in _ADAMW_OPTIONS} for group in groups]
    else:
        for index, state in states.items():
            if missing := [name for name in STATE_NAMES if name not in state]:
                raise ValueError(
                    f"the state of parameter {index} must hold {', '.join(STATE_NAMES)}, or be AdamW's "
                    f"(step, exp_avg, exp_avg_sq), but lacks {', '.join(missing)}; it was saved by another optimizer, "
                    f"so {_ANEW}"
                )
        states = {index: without_scales(state) for index, state in states.items()}
    if len(groups) == len(own_groups):  # else torch's own error says that the numbers of groups differ
        own = ({name: value for name, value in group.items() if name != "params"} for group in own_groups)
        groups = [present | saved for present, saved in zip(own, groups, strict=True)]
    return {**state_dict, "state": states, "param_groups": groups}


def _is_adamw(state: dict[str, Any]) -> bool:
    return not set(state) & {*TRACKERS, "moment_step"} and set(state) >= _ADAMW_NAMES


def _check_adamw(index: Any, state: dict[str, Any]) -> None:
    if "max_exp_avg_sq" in state:
        raise ValueError(
            f"the state of parameter {index} was saved by AdamW with amsgrad=True (it holds max_exp_avg_sq), "
            f"which StableSPAM cannot continue; {_ANEW}"
        )
    rule = f"the state of parameter {index} must hold step, exp_avg, exp_avg_sq and no more to be AdamW's"
    if missing := sorted(_ADAMW_NAMES - set(state)):
        raise ValueError(f"{rule}, but lacks {', '.join(missing)}; the checkpoint is incomplete")
    if unknown := ", ".join(sorted(set(state) - _ADAMW_NAMES)):
        raise ValueError(f"{rule}, but holds {unknown} too; it was saved by another optimizer, so {_ANEW}")


def _check_adamw_group(group: dict[str, Any]) -> None:
    if group.get("decoupled_weight_decay") is False and group.get("weight_decay", 0) != 0:
        raise ValueError(
            f"weight_decay must be 0 to go on from a run of torch.optim.Adam, got {group['weight_decay']!r}: Adam adds "
            f"it to the gradient and StableSPAM decays the weights directly; {_ANEW}"
        )


def _from_adamw(state: dict[str, Any]) -> dict[str, Any]:
    step = torch.as_tensor(state["step"], dtype=torch.float32)
    fresh = {name: step.clone() for name in COUNTERS} | {name: torch.zeros_like(step) for name in TRACKERS}
    return fresh | {name: state[name] for name in MOMENTS}
