"""`optim_args`: from one string of the command line to the optimizer's keyword arguments."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hf_stablespam._names import nearest
from hf_stablespam.trainer.registration.options.lr_scales import OPTIONS as LR_SCALES

if TYPE_CHECKING:
    from hf_stablespam.optim.options import Kind, Option

# A name that is an alias and an option of its own → the key beside which it is the option.
_BESIDE = {"update_proj_gap": "rank"}
# The optimizers whose options the Trainer's `optim` knows.
STABLE_SPAM, SPAM = "stable_spam", "spam"

# What has a field of its own in TrainingArguments.
_FIELDS = {
    "lr": "learning_rate",
    "betas": "adam_beta1 and adam_beta2",
    "eps": "adam_epsilon",
    "weight_decay": "weight_decay",
}


def parse_optim_args(text: str | None, optimizer: str = STABLE_SPAM) -> dict[str, Any]:
    """Read `TrainingArguments.optim_args`.

    Args:
        text: entries `name=value`, joined by commas; spaces do not matter; `None` or empty gives `{}`. Names
            are those of the optimizer's keyword arguments, or an alias of the paper or the official code
            (gamma1, gamma2, gamma3, update_proj_gap, total_T). `none` switches a part off. Beside `rank`
            `update_proj_gap` is GaLore's, as in transformers. `layerwise` and the `…_lr_scale` are
            for the Trainer.
        optimizer: whose options, "stable_spam" (the default) or "spam".

    Returns:
        Keyword arguments of the optimizer: only those that `text` names.

    Raises:
        ValueError: an unknown name, a value that cannot be read, or an option that is given twice.

    Example:
        >>> parse_optim_args("clip_beta=none, norm_betas=0.7:0.9, update_proj_gap=500")
        {'clip_beta': None, 'norm_betas': (0.7, 0.9), 'reset_interval': 500}
    """
    kwargs: dict[str, Any] = {}
    given: dict[tuple[str, int | None], str] = {}
    table = option_table(optimizer)
    entries = re.sub(r"\s", "", text).split(",") if text and text.strip() else []
    keys = {entry.partition("=")[0] for entry in entries if not entry.lower().endswith("=none")}
    aliases = {key: option for key, option in aliases_of(table).items() if _BESIDE.get(key) not in keys}
    for entry in entries:
        key, equals, value = entry.partition("=")
        if not (key and equals and value):
            raise ValueError(
                f"optim_args must be name=value entries joined by commas, got {entry!r} in {text!r}; "
                "write it as in 'clip_beta=0.999,reset_interval=500'"
            )
        name, place = aliases.get(key, (key, None))
        _claim(key, name, place, given)
        kind = _known_kind(key, name, table)
        if place is None:
            kwargs[name] = _read(key, value, kind)
        else:
            pair = list(kwargs.get(name, table[name].default))
            pair[place] = _read(key, value, kind._replace(read=float, expected="a number"))
            kwargs[name] = tuple(pair)
    return kwargs


def _claim(key: str, name: str, place: int | None, given: dict[tuple[str, int | None], str]) -> None:
    """Note that `key` sets the option `name` (or one place of it); an error where another key did already."""
    for (other_name, other_place), other_key in given.items():
        if other_name == name and (place is None or other_place is None or place == other_place):
            raise ValueError(f"optim_args sets {name} twice, by {other_key!r} and by {key!r}; leave one of them out")
    given[name, place] = key


def option_table(optimizer: str) -> "Mapping[str, Option]":
    """The options that `optim_args` may name for an optimizer, from the optimizer's own table."""
    from hf_stablespam.optim import options  # here, because registering must not import torch

    table = {STABLE_SPAM: options.STABLE_SPAM, SPAM: options.SPAM}[optimizer]
    ours = {name: option for name, option in table.items() if name not in _FIELDS}
    if optimizer == STABLE_SPAM:  # what the Trainer's side reads itself
        ours["layerwise"] = options.Option(False, options.FLAG, "update during the backward pass")
    for name, kind in zip(LR_SCALES, ("embeddings", "an untied output head", "norms"), strict=True):
        ours[name] = options.Option(1.0, options.ABOVE_ZERO, f"factor on the learning rate of {kind}")
    return ours


def aliases_of(table: "Mapping[str, Option]") -> dict[str, tuple[str, int | None]]:
    """The names of the paper and of the official code → our option, and the place in it where it is a pair."""
    return {alias: (name, place) for name, option in table.items() for alias, place in option.aliases}


def _known_kind(key: str, name: str, table: "Mapping[str, Option]") -> "Kind":
    if name in table:
        return table[name].kind
    if key in _FIELDS:
        raise ValueError(f"optim_args does not take {key!r}; set {_FIELDS[key]} in TrainingArguments instead")
    aliases = aliases_of(table)
    raise ValueError(
        f"optim_args has the unknown option {key!r}{nearest(key, [*table, *aliases])}; "
        f"known options: {', '.join(table)}; aliases: {', '.join(aliases)}"
    )


def _read(key: str, value: str, kind: "Kind") -> object:
    try:
        return kind.read(value)
    except (ValueError, KeyError):
        raise ValueError(
            f"optim_args: {key} must be {kind.expected}, got {value!r}; leave {key} out for its default"
        ) from None
