"""GaLore in front of Stable-SPAM: clip, normalise and keep moments of a projection of the gradient to few directions.

For a matrix ``W`` with gradient ``G`` and the directions ``L``, ``P`` of `projection`, taken anew from ``G`` every
``update_proj_gap`` steps::

    R = Lᵀ·G·Pᵀ  →  AdaClip  →  AdaGN  →  MoRet, Adam: direction d  →  W ← W·(1−lr·wd) − lr·scale·L·d·P

All trackers and statistics are those of ``R``, which goes through `hf_stablespam.optim.step` as the gradient of a
matrix of zeros. Its largest entry depends on the directions, so that AdaClip's average starts anew with them; its norm
and Adam's moments go on, unless ``reset_on_switch`` resets the moments.
"""

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_stablespam._sharded import is_sharded
from hf_stablespam.optim.formulas import is_usable, safe_norm
from hf_stablespam.optim.galore.projection import (
    principal_directions,
    project,
    project_back,
    projected_shape,
    projected_sides,
)
from hf_stablespam.optim.plan import Batch, Options, Result, State
from hf_stablespam.optim.state.low_bit import clear_moments
from hf_stablespam.optim.state.stochastic_rounding import store

logger = logging.getLogger(__name__)

_SIDES = ("project_left", "project_right")


class Projected(NamedTuple):
    """Matrices of one group whose gradients are projected in this step."""

    batch: Batch
    options: Options
    low: Batch  # zeros, which become the update; projected gradients; the same states
    decay: Any  # 1 − lr·wd, of the matrices themselves


def is_target(param: Tensor, options: Options) -> bool:
    """Whether a parameter is projected: a matrix in a group with a rank."""
    if options["rank"] is None or param.dim() != 2:
        return False
    if is_sharded(param):  # no process could take its singular value decomposition alone
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

    The directions have the parameter's dtype; ``clip_since`` is the step at which they were taken, and AdaClip's
    average began. ``project_age``, steps since then, −1 before the first directions, is on the CPU, where reading it
    waits for no device; on an accelerator it counts gradients that are not finite too, until the next switch is due.
    """
    rank = min(options["rank"], *param.shape)
    shapes = {"project_left": (param.shape[0], rank), "project_right": (rank, param.shape[1])}
    sides = dict(zip(_SIDES, projected_sides(param.shape, options["proj_type"]), strict=True))
    state = {name: param.new_zeros(shapes[name]) for name, used in sides.items() if used}
    state["project_age"] = torch.full((), -1.0)
    state["clip_since"] = torch.zeros((), dtype=torch.float32, device=param.device)
    return state


def split_projected(batch: Batch, options: Options) -> tuple[Batch, Projected | None]:
    """The parameters of a group that are not projected, and those that are, with their projected gradients."""
    chosen = [index for index, state in enumerate(batch.states) if "project_age" in state]
    if not chosen:
        return batch, None
    rest = sorted(set(range(len(batch.params))) - set(chosen))
    matrices = batch.pick(chosen)
    grads = [_projected(*pair, options) for pair in zip(matrices.grads, matrices.states, strict=True)]
    low = Batch([torch.zeros_like(grad) for grad in grads], grads, matrices.states)
    decay = 1 - options["lr"] * options["weight_decay"]
    return batch.pick(rest), Projected(matrices, {**options, "weight_decay": 0.0}, low, decay)


def apply_updates(projections: list[Projected], results: list[Result]) -> list[Result]:
    """Add the updates of projections, whose ``low`` went through the step, to the weights; these get the statistics."""
    matrices = {id(low): (one, index) for one in projections for index, low in enumerate(one.low.params)}
    renamed = []
    for params, statistics in results:
        owners = []
        for param, bad in zip(params, statistics["nonfinite"].unbind(), strict=True):
            if found := matrices.get(id(param)):
                one, index = found
                param = one.batch.params[index]
                _apply(one, index, bad)
            owners.append(param)
        renamed.append(Result(owners, statistics))
    return renamed


def _apply(projected: Projected, index: int, bad: Tensor) -> None:
    param, low, state = projected.batch.params[index], projected.low.params[index], projected.batch.states[index]
    update = project_back(low, *(state.get(name) for name in _SIDES))
    weight = param.to(low.dtype) * projected.decay + projected.options["scale"] * update
    store(param, torch.where(bad > 0, param, weight), stochastic=projected.options["stochastic_rounding"])


def _projected(grad: Tensor, state: State, options: Options) -> Tensor:
    """``R``; ``nan`` where ``G``'s squared norm is not finite, so that the step passes the matrix over."""
    grad = grad.to(state["clip_max"].dtype)
    usable = is_usable(safe_norm(grad, grad.abs().amax()))
    _advance(grad, usable, state, options)
    low = project(grad, *(state.get(name) for name in _SIDES))
    return torch.where(usable, low, torch.nan)


def _advance(grad: Tensor, usable: Tensor, state: State, options: Options) -> None:
    """Count the step; take new directions when it is time, or as soon after as a gradient can be decomposed."""
    age, gap = int(state["project_age"]), options["update_proj_gap"]
    is_due = age < 0 or age + 1 >= gap
    if (is_due or usable.is_cpu) and not bool(usable):  # from an accelerator it is read only when an SVD is due
        return
    if age >= 0 and is_due and not usable.is_cpu:
        age = int(state["step"] - state["clip_since"]) - 1
        is_due = age + 1 >= gap
    if not is_due:
        state["project_age"].fill_(age + 1)
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
        clear_moments(state)


def warn_of_clamped_rank(group: Options) -> None:
    """One line for all matrices of a group that have no such rank."""
    shapes = [tuple(param.shape) for param in group["params"] if param.dim() == 2]
    clamped = [shape for shape in shapes if min(shape) < (group["rank"] or 0)]
    if clamped:
        logger.warning(
            "rank=%d is above the smaller side of %d of the group's matrices, such as %s: "
            "they are projected to that side's full length, which saves nothing",
            *(group["rank"], len(clamped), clamped[0]),
        )
