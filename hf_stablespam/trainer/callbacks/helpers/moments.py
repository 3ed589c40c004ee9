"""Zero the moments of any optimizer that keeps them."""

from typing import Any

import torch

# Where optimizers keep moments: torch's and transformers' Adam family and Adafactor, Muon, SGD with momentum,
# torchao's low-bit Adam, and bitsandbytes (`state1`, `state2` and the scales of their quantised blocks).
_MOMENTS = frozenset(
    (
        *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer"),
        *("exp_avg_sq_row", "exp_avg_sq_col", "row_var", "col_var", "variance"),
        *("state1", "state2", "absmax1", "absmax2", "max1", "max2", "new_max1", "new_max2"),
    )
)
# Counters of bias correction, and the value that they start from (NAdam's product of momenta starts from 1).
_COUNTERS = {"step": 0, "mu_product": 1}
# Left on an optimizer: how often its moments were reset from here, whoever asked for it.
_RESETS = "_hf_stablespam_resets"
# An optimizer that has one of these options, and has it switched on, will keep moments once it has stepped.
_OPTIONS = ("betas", "momentum", "decay_rate", "beta2_decay")


def unwrap(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrappers."""
    while getattr(optimizer, "optimizer", None) is not None:
        optimizer = optimizer.optimizer
    return optimizer


def keeps_moments(optimizer: Any) -> bool:
    """Whether `reset_moments` will find something to reset; known before the first step."""
    optimizer = unwrap(optimizer)
    return hasattr(optimizer, "reset_moments") or any(
        bool(group.get(option)) for group in optimizer.param_groups for option in _OPTIONS
    )


def count_resets(optimizer: Any) -> int:
    """How often `reset_moments` has reset this optimizer."""
    return getattr(unwrap(optimizer), _RESETS, 0)


@torch.no_grad()
def reset_moments(optimizer: Any) -> None:
    """Set the moments of every parameter, and the counters of their bias correction, to where they began.

    An optimizer with a method `reset_moments` (StableSPAM) does it itself, and keeps what is no moment.

    Args:
        optimizer: any optimizer, wrapped by accelerate or not; nothing happens before its first step.
    """
    optimizer = unwrap(optimizer)
    setattr(optimizer, _RESETS, count_resets(optimizer) + 1)
    if hasattr(optimizer, "reset_moments"):
        optimizer.reset_moments()
        return
    for state in optimizer.state.values():
        for name, value in state.items():
            if name in _COUNTERS:
                state[name] = _set(value, _COUNTERS[name])
            elif name in _MOMENTS and value is not None:
                state[name] = _set(value, 0)


def _set(value: Any, start: int) -> Any:
    if not isinstance(value, torch.Tensor):
        return type(value)(start)
    # `copy_` and not `fill_`: torchao's quantised states implement the former only.
    return value.copy_(torch.full(value.shape, start, dtype=value.dtype, device=value.device))
