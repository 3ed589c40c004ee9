"""A few steps of copies of an optimizer on small tensors: what do they change, and does a reset undo all of it?"""

import itertools
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_stablespam.trainer.callbacks.helpers.remembered import (
    ELSEWHERE,
    Changes,
    begin_anew,
    changes_between,
    copied,
    outside_state,
    own_params,
    remembered,
)

_STEPS = 12  # before the reset, and after it: RAdam does nothing in its first steps
_LARGEST = 64  # entries along a dimension: 64 × 64 is what 8-bit optimizers begin to quantize at
_RATE = 1e-2  # at the start of a warm-up the learning rate is 0, and nothing would be seen
_INSTEAD = "remove the callback, or use an optimizer such as stable_spam or adamw_torch"


def rehearse(optimizer: Any) -> Changes:
    """Try steps, a reset and steps on small copies of an optimizer. Neither it nor any random generator notices.

    Args:
        optimizer: before its first step.

    Returns:
        What a reset has to put back: the least with which the copy goes on like a new one.

    Raises:
        ValueError: nothing is kept from one step to the next, or not all of it can be reset, or the steps fail.
    """
    name = type(optimizer).__name__
    devices = {param.device for group in optimizer.param_groups for param in group["params"] if param.is_cuda}
    problems = []
    # Some compile their step, which takes longer than all of this.
    with torch.random.fork_rng(list(devices)), torch.compiler.set_stance("force_eager"):
        for objects, begins_with_state in itertools.product((False, True), repeat=2):
            try:
                changes = _tried(optimizer, objects, begins_with_state)
            except NothingKeptError:
                raise
            except Exception as error:
                problems.append(error)
                continue
            if changes is not None:
                return changes
    failed = f", and a try of it failed with {type(problems[0]).__name__}: {problems[0]}" if problems else ""
    raise ValueError(
        f"MomentumResetCallback must reset all that an optimizer remembers, and {name} cannot be made to go on like a "
        f"new one{failed}; {_INSTEAD}"
    ) from (problems[0] if problems else None)


class NothingKeptError(ValueError):
    """Earlier steps make no difference to later ones."""


def _tried(optimizer: Any, objects: bool, begins_with_state: bool) -> Changes | None:
    """What has to be put back, None where a reset with that is not enough."""
    reset, new, going_on = (_small_copy(optimizer, begins_with_state) for _ in range(3))
    before, first_state = outside_state(reset), copied(reset.state, reset.state.keys(), own_params(reset))
    updates = _steps(reset, seed=1)
    if not any(update.any() for update in updates):
        raise RuntimeError("step() updates no weights (are they updated inside the backward pass?)")
    changes = changes_between(before, outside_state(reset), objects=objects, begins_with_state=begins_with_state)
    begin_anew(reset, remembered(new, changes)._replace(state=first_state))
    _copy_weights(reset, new)
    _steps(going_on, seed=1)
    after_reset, of_new, without_reset = (_steps(one, seed=2) for one in (reset, new, going_on))
    if _agree(without_reset, of_new):
        raise NothingKeptError(
            f"MomentumResetCallback needs an optimizer that keeps moments, got {type(optimizer).__name__}; {_INSTEAD}"
        )
    return changes if _agree(after_reset, of_new) else None


def _small_copy(optimizer: Any, begins_with_state: bool) -> Any:
    """An optimizer of the same class and options, without hooks, of small parameters."""
    stand_ins: dict[int, Any] = {}
    first: dict[Any, Tensor] = {}
    groups = []
    for group in optimizer.param_groups:
        by_dims: dict[int, torch.nn.Parameter] = {}
        for param in group["params"]:
            stand_in = stand_ins[id(param)] = by_dims.setdefault(param.dim(), _stand_in(param))
            first.setdefault(stand_in, param)
        groups.append(copied(group, group.keys() - {"params", "param_names"}, stand_ins))
        groups[-1] |= {"params": list(by_dims.values()), "lr": _with_rate(group.get("lr"))}
    twin, own = object.__new__(type(optimizer)), vars(optimizer)
    ours = {name for name in own if name.startswith("_hf_stablespam")}
    hooks = {name for name, value in own.items() if isinstance(value, OrderedDict) and name.startswith("_optimizer_")}
    vars(twin).update({name: OrderedDict() for name in hooks})
    # a scheduler wraps `step`, in an attribute of that name
    vars(twin).update(copied(own, own.keys() - hooks - ours - {*ELSEWHERE, "stabilizer", "step"}, stand_ins))
    twin.param_groups, twin.state = groups, defaultdict(dict)
    if begins_with_state:
        _check_small(optimizer.state)
        twin.state.update(copied(optimizer.state, [key for key in optimizer.state if id(key) not in stand_ins], {}))
        for stand_in, param in first.items():
            twin.state.update({stand_in: copied(optimizer.state, [param], stand_ins).get(param, {})})
    if hasattr(twin, "train"):  # as the Trainer does with those of `schedulefree`
        twin.train()
    return twin


def _check_small(state: Any) -> None:
    """Numbers are what a constructor puts in; tensors of the parameters' shapes may be left by earlier steps."""
    for values in state.values():
        for value in values.values() if isinstance(values, dict) else [values]:
            if isinstance(value, Tensor) and value.numel() > 1:
                raise RuntimeError("it has state before its first step")


def _stand_in(param: Tensor) -> torch.nn.Parameter:
    shape = [min(size, _LARGEST) for size in param.shape]
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return torch.nn.Parameter(values.to(param.device, param.dtype), requires_grad=param.requires_grad)


def _with_rate(rate: Any) -> Any:
    if isinstance(rate, Tensor):
        return torch.full_like(rate, _RATE)
    return None if rate is None else _RATE  # None: the optimizer makes its own


def _steps(optimizer: Any, seed: int) -> list[Tensor]:
    """Take steps, with the same gradients for the same seed; the updates of all tensors in all of them."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    params = [param for group in optimizer.param_groups for param in group["params"] if param.requires_grad]
    updates = []
    for _ in range(_STEPS):
        before = [param.detach().clone() for param in params]
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(param.device, param.dtype)
        optimizer.step()
        updates += [param.detach() - old for param, old in zip(params, before, strict=True)]
    return updates


@torch.no_grad()
def _copy_weights(source: Any, target: Any) -> None:
    for group, other in zip(source.param_groups, target.param_groups, strict=True):
        for param, into in zip(group["params"], other["params"], strict=True):
            into.copy_(param)


def _agree(updates: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Equal but for rounding, measured by the largest entry of each update: some optimizers begin with tiny ones."""
    pairs = [(a, b) for a, b in zip(updates, others, strict=True) if a.numel()]
    return all((a - b).abs().max() <= 1e-3 * torch.maximum(a.abs().max(), b.abs().max()) for a, b in pairs)
