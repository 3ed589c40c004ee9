"""The state of a parameter: its names, how it begins, and what a saved one must hold."""

from typing import Any

import torch
from torch import Tensor

from hf_stablespam.optim.galore.step import is_target, projected_example, projection_state
from hf_stablespam.optim.plan import MOMENTS, Options, State
from hf_stablespam.optim.state import low_bit

COUNTERS = ("step", "moment_step", "adopted_at")
TRACKERS = ("clip_max", "norm_mean", "norm_sq")
STATE_NAMES = (*COUNTERS, *TRACKERS, *MOMENTS)


def fresh_trackers(param: Tensor) -> State:
    """Zeros: counters in float32 as torch keeps them, the others in float32, or float64 for float64 parameters."""
    precise = torch.promote_types(param.dtype, torch.float32)
    dtypes = dict.fromkeys(COUNTERS, torch.float32) | dict.fromkeys(TRACKERS, precise)
    return {name: torch.zeros((), dtype=dtype, device=param.device) for name, dtype in dtypes.items()}


def fresh_state(param: Tensor, options: Options) -> State:
    """Trackers, and moments as the options say."""
    state = fresh_trackers(param)
    if is_target(param, options):
        state |= projection_state(param, options)
        param = projected_example(param, options)
    if low_bit.fits(param, options["state_bits"]):
        return state | low_bit.zero_moments(param.shape, options["state_bits"], param.device)
    dtype, layout = moment_dtype(param, options["state_dtype"]), torch.preserve_format
    return state | {name: torch.zeros_like(param, dtype=dtype, memory_format=layout) for name in MOMENTS}


def moment_dtype(param: Tensor, asked: torch.dtype | None = None) -> torch.dtype:
    """What is asked for, or else the parameter's; but V of float16 would underflow to 0 and M/√V explode.

    A float64 parameter keeps float64 moments: its gradients may be such that float32 cannot hold their squares.
    """
    if param.dtype == torch.float64:
        return torch.float64
    if asked is None and param.dtype == torch.float16:
        return torch.float32
    return asked or param.dtype


def without_scales(state: dict[str, Any]) -> dict[str, Any]:
    """A state of version 0.1, whose moments stood beside numbers to multiply them by."""
    kept = {name: value for name, value in state.items() if name not in ("exp_avg_scale", "exp_avg_sq_scale")}
    for name in MOMENTS:
        scale = state.get(f"{name}_scale")
        if scale is not None and name in state and (factor := float(scale)) != 1:
            kept[name] = state[name] * factor
    return kept
