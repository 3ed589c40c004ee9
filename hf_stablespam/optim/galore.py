"""GaLore in front of Stable-SPAM: clip, normalise and keep moments of a projection of the gradient to few directions.

For a matrix ``W`` with gradient ``G`` and the directions ``L``, ``P`` of `projection`, taken anew from ``G`` every
``update_proj_gap`` steps::

    R = Lᵀ·G·Pᵀ  →  AdaClip  →  AdaGN  →  MoRet, Adam: direction d  →  W ← W·(1−lr·wd) − lr·scale·L·d·P

All trackers and statistics are those of ``R``. Its largest entry depends on the directions, so that AdaClip's average
starts anew with them; its norm and Adam's moments go on, unless ``reset_on_switch`` resets the moments.
"""

import logging
from typing import Any

import torch
from torch import Tensor

from hf_stablespam.optim.low_bit import clear
from hf_stablespam.optim.plan import Batch, Options, State
from hf_stablespam.optim.projection import principal_directions, project, project_back, projected_shape, projected_sides
from hf_stablespam.optim.rounding import store
from hf_stablespam.optim.single_tensor import adam, stabilized, store_state

logger = logging.getLogger(__name__)

_SIDES = ("project_left", "project_right")


def is_target(param: Tensor, options: Options) -> bool:
    """Whether a parameter is projected: a matrix in a group with a rank.

    Raises:
        ValueError: for a sharded one, whose singular value decomposition no process could take alone.
    """
    if options["rank"] is None or param.dim() != 2:
        return False
    if hasattr(param, "device_mesh"):
        raise ValueError(
            f"rank must be None for a sharded parameter (DTensor), got {options['rank']} for one of shape "
            f"{tuple(param.shape)}; train with DDP"
        )
    return True


def projected_example(param: Tensor, options: Options) -> Tensor:
    """A tensor without memory that says what the moments of a projected parameter look like."""
    shape = projected_shape(param.shape, options["rank"], options["proj_type"])
    return torch.zeros((), dtype=param.dtype, device=param.device).expand(shape)


def projection_state(param: Tensor, options: Options) -> State:
    """What a projected parameter keeps beside trackers and moments.

    The directions have the parameter's dtype; ``project_age``, steps since they were taken, −1 before the first, is on
    the CPU, where reading it waits for no device; ``clip_since`` is the step at which AdaClip's average began.
    """
    rank = min(options["rank"], *param.shape)
    shapes = {"project_left": (param.shape[0], rank), "project_right": (rank, param.shape[1])}
    sides = dict(zip(_SIDES, projected_sides(param.shape, options["proj_type"]), strict=True))
    state = {name: param.new_zeros(shapes[name]) for name, used in sides.items() if used}
    state["project_age"] = torch.full((), -1.0)
    state["clip_since"] = torch.zeros((), dtype=torch.float32, device=param.device)
    return state


def is_projected(state: State) -> bool:
    """Whether this is the state of a projected parameter."""
    return "project_age" in state


def galore_step(param: Tensor, grad: Tensor, state: State, options: Options) -> dict[str, Tensor]:
    """Update a matrix and its state in place; return the statistics of the step, which are those of ``R``.

    A gradient that is not finite changes nothing, and is not decomposed: the next finite one is.
    """
    grad = grad.to(state["clip_max"].dtype)
    _advance(grad, state, options)
    sides = [state.get(name) for name in _SIDES]
    low, plan, statistics = stabilized(project(grad, *sides), state, options)
    exp_avg, exp_avg_sq, update = adam(torch.zeros_like(low[0, 0]), low, state, plan, options)
    store_state(state, plan, exp_avg, exp_avg_sq)
    decayed = param.to(low.dtype) * (1 - options["lr"] * options["weight_decay"])
    weight = decayed + options["scale"] * project_back(update, *sides)
    store(param, torch.where(plan.finite, weight, param), stochastic=options["stochastic_rounding"])
    return statistics


def galore_path(batch: Batch, options: Options) -> dict[str, Tensor]:
    """`galore_step` for one parameter after the other."""
    rows = [galore_step(*tensors, options) for tensors in zip(*batch, strict=True)]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _advance(grad: Tensor, state: State, options: Options) -> None:
    """Count the step; take new directions when it is time, or as soon after as the gradient is finite."""
    age = int(state["project_age"])
    is_due = age < 0 or age + 1 >= options["update_proj_gap"]
    if not (is_due and bool(grad.isfinite().all())):  # read from the device only when an SVD is due
        if age >= 0:
            state["project_age"] += 1
        return
    rank = min(options["rank"], *grad.shape)
    directions = principal_directions(grad, rank, options["proj_type"])
    for name, matrix in zip(_SIDES, directions, strict=True):
        if matrix is not None:
            state[name].copy_(matrix)
    state["project_age"].zero_()
    state["clip_max"].zero_()
    state["clip_since"].copy_(state["step"])
    if options["reset_on_switch"]:
        for name in ("exp_avg", "exp_avg_sq", "moment_step"):
            clear(state[name])


def warn_of_clamped_rank(params: list[Any], rank: int) -> None:
    """One line for all matrices of a group that have no such rank."""
    clamped = [tuple(param.shape) for param in params if param.dim() == 2 and min(param.shape) < rank]
    if clamped:
        logger.warning(
            "rank=%d is above the smaller side of %d of the group's matrices, such as %s: "
            "they are projected to that side's full length, which saves nothing",
            rank,
            len(clamped),
            clamped[0],
        )
