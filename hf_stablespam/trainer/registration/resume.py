"""What a checkpoint's optimizer state is of, against what a resumed run is: other parameters, other options.

torch loads by counting, and what it loads replaces the options that were given. So a run that trains other parameters
than the checkpoint's gets their moments (or an error that names none of them), and options that were changed for the
resume count for nothing, without a word.
"""

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from hf_stablespam._sharded import is_sharded
from hf_stablespam.optim.base import MeasuringOptimizer
from hf_stablespam.trainer.callbacks.helpers.unwrapping import unwrap

if TYPE_CHECKING:
    import torch
    from transformers import Trainer

logger = logging.getLogger(__name__)

_NAMES = "param_names"  # torch's own key for them
_HOOK = "_names_in_checkpoints"  # attribute of an optimizer
# What torch.optim.AdamW has in common with StableSPAM: of its other options nothing is taken over.
_ADAMW_OPTIONS = {"initial_lr", "betas", "eps", "weight_decay", "maximize"}
_NO_OPTIONS = {"params", _NAMES, "lr", "decay_steps", "decay_spans_run"}  # `run_length.py` speaks of the decay
_FIELDS = {"initial_lr": "learning_rate", "betas": "adam_beta1 and adam_beta2", "eps": "adam_epsilon"}
_SHOWN = 6  # names in a message
_REMEDY = "train the same parameters as the run that was saved, or begin a new run from the weights alone"


def note_names(optimizer: Any, model: "torch.nn.Module | None") -> None:
    """Write the names of the parameters into the checkpoints of one of our optimizers.

    Not into its groups: torch takes no group without names beside one that has them, and a callback may add one.
    """
    inner = unwrap(optimizer)
    if not isinstance(inner, MeasuringOptimizer) or model is None:
        return
    if (former := inner.__dict__.pop(_HOOK, None)) is not None:  # of another run
        former.remove()

    def name(optimizer: Any, state_dict: dict[str, Any]) -> None:
        for group, names in zip(state_dict["param_groups"], names_of(optimizer, model), strict=True):
            if names is not None:
                group[_NAMES] = names

    inner.__dict__[_HOOK] = inner.register_state_dict_post_hook(name)


def names_of(optimizer: Any, model: "torch.nn.Module") -> list[list[str] | None]:
    """The names of each group's parameters in the model; none for a group that has others too.

    None where parameters are sharded: their checkpoints go by names already.
    """
    groups = [group["params"] for group in optimizer.param_groups]
    if any(is_sharded(param) for params in groups for param in params):
        return [None] * len(groups)
    known = {id(param): name for name, param in model.named_parameters()}
    found = [[known[id(param)] for param in params if id(param) in known] for params in groups]
    return [names if len(names) == len(params) else None for names, params in zip(found, groups, strict=True)]


@contextlib.contextmanager
def comparing_with_checkpoint(trainer: "Trainer") -> Iterator[None]:
    """While a Trainer loads a checkpoint, compare what the optimizer gets with what it is.

    Raises:
        ValueError: while loading, the checkpoint is of other parameters.
    """
    from hf_stablespam.trainer.callbacks.helpers.kept_state import KeepsState
    from hf_stablespam.trainer.callbacks.momentum_reset import MomentumResetCallback

    callbacks = trainer.callback_handler.callbacks
    for callback in callbacks:
        if isinstance(callback, KeepsState) and hasattr(callback, "before_loading"):
            callback.before_loading(trainer.optimizer)
    optimizer: Any = unwrap(trainer.optimizer)
    if not isinstance(optimizer, MeasuringOptimizer):
        yield
        return
    ignored = {"reset_interval"} if any(isinstance(one, MomentumResetCallback) for one in callbacks) else set()

    def compare(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        check_same_parameters(optimizer, state_dict, trainer.model)
        changed = changed_options(optimizer, state_dict, ignored)
        if changed and trainer.args.process_index == 0:
            logger.warning(
                "the options of the checkpoint hold, not those of this run: %s; to train with those of this run, begin "
                "a new one from the checkpoint's weights",
                ", ".join(changed),
            )
        return {**state_dict, "param_groups": _named_alike(state_dict["param_groups"], optimizer)}

    hook = optimizer.register_load_state_dict_pre_hook(compare, prepend=True)
    try:
        yield
    finally:
        hook.remove()


def _named_alike(groups: list[dict[str, Any]], optimizer: Any) -> list[dict[str, Any]]:
    """Saved groups with names only where the optimizer's own have them: it would take them over."""
    if any(_NAMES in group for group in optimizer.param_groups):
        return groups
    return [{key: group[key] for key in group if key != _NAMES} for group in groups]


def changed_options(optimizer: Any, state_dict: dict[str, Any], ignored: set[str]) -> list[str]:
    """Options that loading will replace by others, in words."""
    found: dict[str, None] = {}
    for own, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=False):
        adamw = not saved.keys() >= optimizer.defaults.keys() - _ADAMW_OPTIONS - _NO_OPTIONS
        names = (own.keys() & saved.keys()) - _NO_OPTIONS - ignored
        for name in sorted(names & _ADAMW_OPTIONS if adamw else names):
            if _plain(own[name]) != _plain(saved[name]):
                label = _FIELDS.get(name, name)
                found[f"{label}={_plain(saved[name])} holds ({_plain(own[name])} was given)"] = None
    return list(found)


def check_same_parameters(optimizer: Any, state_dict: dict[str, Any], model: Any) -> None:
    """The state is of the parameters that the optimizer trains, in its order.

    Raises:
        ValueError: it is of others; the message names them where the checkpoint does, else those that may be meant.
    """
    own, saved = optimizer.param_groups, state_dict["param_groups"]
    if any(is_sharded(param) for group in own for param in group["params"]):
        return
    ours, theirs = names_of(optimizer, model), [group.get(_NAMES) for group in saved]
    if None not in ours and None not in theirs:
        if ours == theirs:
            return
        here, there = ([name for names in groups for name in names or ()] for groups in (ours, theirs))
        raise ValueError(
            f"the optimizer state of the checkpoint is of {len(there)} parameters, and this run trains {len(here)}; "
            f"{_difference(here, there)}; {_REMEDY}"
        )
    counts, saved_counts = ([len(group["params"]) for group in groups] for groups in (own, saved))
    if counts != saved_counts:
        raise ValueError(
            f"the optimizer state of the checkpoint is of {sum(saved_counts)} parameters, in groups of {saved_counts}, "
            f"and this run trains {sum(counts)}, in groups of {counts}; {_likely(optimizer, state_dict, model)}; "
            f"{_REMEDY}"
        )


def _difference(here: list[str], there: list[str]) -> str:
    missing, new = [name for name in there if name not in set(here)], [name for name in here if name not in set(there)]
    parts = [
        *([f"not trained now: {_listed(missing)}"] if missing else []),
        *([f"not in the checkpoint: {_listed(new)}"] if new else []),
    ]
    return "; ".join(parts) or "the same ones in another order or in other groups"


def _likely(optimizer: Any, state_dict: dict[str, Any], model: Any) -> str:
    """The names that may be meant, by the shapes of what was saved; older checkpoints have no names."""
    saved = Counter(
        next((tuple(v.shape) for v in state.values() if getattr(v, "ndim", 0)), ())
        for state in state_dict["state"].values()
    )
    params = dict(model.named_parameters())
    trained = {id(param) for group in optimizer.param_groups for param in group["params"]}
    present = Counter(tuple(param.shape) for param in params.values() if id(param) in trained)
    missing = [n for n, p in params.items() if id(p) not in trained and (saved - present)[tuple(p.shape)]]
    new = [n for n, p in params.items() if id(p) in trained and (present - saved)[tuple(p.shape)]]
    parts = [
        *([f"not trained now, and of a shape that the checkpoint has more of: {_listed(missing)}"] if missing else []),
        *([f"trained now, and of a shape that it has less of: {_listed(new)}"] if new else []),
    ]
    return "; ".join(parts) or "the checkpoint does not say which"


def _listed(names: list[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _plain(value: Any) -> Any:
    """As it is compared and shown: a rate that is a tensor as a number, a list as a tuple."""
    value = value.item() if hasattr(value, "item") else value
    return tuple(value) if isinstance(value, list) else value
