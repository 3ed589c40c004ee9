"""What an optimizer holds before its first step, and how to put it back."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_stablespam.optim.stabilize.stabilizer import Stabilizer

ELSEWHERE = ("state", "param_groups")  # of the attributes: these have places of their own
_PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device)
_NOT_ITS_OWN = ("params", "lr", "initial_lr", "param_names")  # of a group: others change these


class Changes(NamedTuple):
    """What steps change outside of `optimizer.state`, and what the constructor has put into it."""

    group_keys: frozenset[str]
    attributes: frozenset[str]
    begins_with_state: bool = False


class Remembered(NamedTuple):
    """The values before the first step."""

    groups: list[dict[str, Any]]  # a key that is missing did not exist
    attributes: dict[str, Any]
    state: dict[Any, Any]
    changes: Changes


def remembered(optimizer: Any, changes: Changes) -> Remembered:
    """Keep the values that `begin_anew` puts back.

    Args:
        optimizer: before its first step.
        changes: which values.
    """
    params = own_params(optimizer)
    groups = [copied(group, changes.group_keys, params) for group in optimizer.param_groups]
    state = copied(optimizer.state, optimizer.state.keys(), params) if changes.begins_with_state else {}
    return Remembered(groups, copied(vars(optimizer), changes.attributes, params), state, changes)


def begin_anew(optimizer: Any, fresh: Remembered) -> None:
    """Make the optimizer forget all its steps: options, learning rates, hooks and trackers of `stabilize` stay."""
    stabilizer = getattr(optimizer, "stabilizer", None)
    if isinstance(stabilizer, Stabilizer):
        stabilizer._adopt_loaded()  # after a resume its trackers lie in the state until the next step
    params = own_params(optimizer)
    optimizer.state.clear()
    present = [key for key in fresh.state if not isinstance(key, Tensor) or id(key) in params]
    optimizer.state.update(copied(fresh.state, present, params))
    for group, values in zip(optimizer.param_groups, fresh.groups, strict=True):
        _put_back(group, fresh.changes.group_keys, values, params)
    _put_back(vars(optimizer), fresh.changes.attributes, fresh.attributes, params)


def outside_state(optimizer: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What the optimizer holds in its groups and attributes, copied."""
    params, own = own_params(optimizer), vars(optimizer)
    groups = [copied(group, group.keys() - {*_NOT_ITS_OWN}, params) for group in optimizer.param_groups]
    return groups, copied(own, own.keys() - {*ELSEWHERE}, params)


def changes_between(before: Any, after: Any, *, objects: bool, begins_with_state: bool) -> Changes:
    """What differs between two answers of `outside_state`.

    Args:
        before: the first.
        after: the second.
        objects: whether objects that are neither numbers, tensors nor containers count, of which there may be one only.
        begins_with_state: taken over.
    """
    (old_groups, old), (new_groups, new) = before, after
    keys = {key for a, b in zip(old_groups, new_groups, strict=True) for key in _changed(a, b, objects)}
    return Changes(frozenset(keys), frozenset(_changed(old, new, objects)), begins_with_state)


def own_params(optimizer: Any) -> dict[int, Any]:
    """For copies that are to hold the very parameters of an optimizer."""
    return {id(param): param for group in optimizer.param_groups for param in group["params"]}


def copied(values: Mapping[Any, Any], names: Iterable[Any], params: Mapping[int, Any]) -> dict[Any, Any]:
    """Deep copies of some values, with the parameters of `params` (by the `id` of the original) in them."""
    found = {}
    for name in names:
        if name in values:
            try:
                found[name] = copy.deepcopy(values[name], dict(params))
            except Exception:  # a process group, a stream, a lock: there is one of it, and no step changes it
                found[name] = values[name]
    return found


def _put_back(
    target: dict[str, Any], names: Iterable[str], values: Mapping[str, Any], params: Mapping[int, Any]
) -> None:
    for name in names:
        target.pop(name, None)
    target.update(copied(values, names, params))


def _changed(old: Mapping[Any, Any], new: Mapping[Any, Any], objects: bool) -> set[Any]:
    return {key for key in {*old, *new} if key not in old or key not in new or not _same(old[key], new[key], objects)}


def _same(old: Any, new: Any, objects: bool, depth: int = 4) -> bool:
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        return old.shape == new.shape and torch.equal(old, new)
    if type(old) is not type(new):
        return False
    if isinstance(old, _PLAIN):
        return old == new
    if depth == 0:
        return True
    if isinstance(old, Mapping):
        return old.keys() == new.keys() and all(_same(old[key], new[key], objects, depth - 1) for key in old)
    if isinstance(old, list | tuple):
        return len(old) == len(new) and all(_same(a, b, objects, depth - 1) for a, b in zip(old, new, strict=True))
    return not (objects and hasattr(old, "__dict__")) or _same(vars(old), vars(new), objects, depth - 1)
