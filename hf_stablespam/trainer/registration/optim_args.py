"""`optim_args`: from one string of the command line to the optimizer's keyword arguments."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from hf_stablespam._names import nearest


class _Option(NamedTuple):
    parse: Callable[[str], object]
    expected: str


def _or_none(parse: Callable[[str], object]) -> Callable[[str], object]:
    return lambda text: None if text.lower() == "none" else parse(text)


def _steps(text: str) -> int | str:
    return "auto" if text.lower() == "auto" else int(text)


def _pair(text: str) -> tuple[float, float]:
    first, second = text.split(":")
    return float(first), float(second)


def _switch(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]


def _float_dtype(text: str) -> object:
    import torch  # here, because registering must not import it

    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[text.lower()]


class Dialect(NamedTuple):
    """What `optim_args` understands for one optimizer."""

    options: Mapping[str, _Option]
    aliases: Mapping[str, tuple[str, int | None]]  # other name → our option, and the place in it where it is a pair
    pair_defaults: Mapping[str, tuple[float, float]] = {}
    beside: Mapping[str, str] = {}  # an alias that is an option's own name → the key beside which it is that option


OPTIONS: Mapping[str, _Option] = {
    "clip_beta": _Option(_or_none(float), "a number or none"),
    "norm_betas": _Option(_or_none(_pair), "two numbers joined by a colon, such as 0.7:0.9, or none"),
    "reset_interval": _Option(_or_none(int), "an integer or none"),
    "decay_steps": _Option(_or_none(_steps), "an integer, auto or none"),
    "decay_floor": _Option(float, "a number"),
    "maximize": _Option(_switch, "true or false"),
    "foreach": _Option(_or_none(_switch), "true, false or none"),
    "fused": _Option(_or_none(_switch), "true, false or none"),
    "state_dtype": _Option(_or_none(_float_dtype), "float32, bfloat16, float16 or none"),
    "stochastic_rounding": _Option(_switch, "true or false"),
    "state_bits": _Option(int, "an integer"),
    "rank": _Option(_or_none(int), "an integer or none"),
    "update_proj_gap": _Option(int, "an integer"),
    "scale": _Option(float, "a number"),
    "proj_type": _Option(str, "std, reverse_std, left, right or full"),
    "reset_on_switch": _Option(_switch, "true or false"),
}

# The names of the paper and of the official code → our option, and the place in it where it is a pair.
ALIASES: Mapping[str, tuple[str, int | None]] = {
    "gamma1": ("norm_betas", 0),
    "gamma2": ("norm_betas", 1),
    "gamma3": ("clip_beta", None),
    "update_proj_gap": ("reset_interval", None),
    "total_T": ("decay_steps", None),
}
# What the Trainer's side reads itself.
_TRAINER_OPTIONS = {"layerwise": _Option(_switch, "true or false")}
STABLE_SPAM = Dialect(
    {**OPTIONS, **_TRAINER_OPTIONS},
    ALIASES,
    pair_defaults={"norm_betas": (0.7, 0.9)},
    beside={"update_proj_gap": "rank"},
)

SPAM = Dialect(
    options={
        "threshold": _Option(_or_none(float), "a number or none"),
        "clip_delay": _Option(int, "an integer"),
        "reset_interval": _Option(_or_none(int), "an integer or none"),
        "warmup_steps": _Option(int, "an integer"),
        "density": _Option(float, "a number"),
        "seed": _Option(int, "an integer"),
        "maximize": _Option(_switch, "true or false"),
    },
    aliases={
        "DeltaT": ("reset_interval", None),
        "update_proj_gap": ("reset_interval", None),
        "warmup_epoch": ("warmup_steps", None),
    },
)

# What has a field of its own in TrainingArguments.
_FIELDS = {
    "lr": "learning_rate",
    "betas": "adam_beta1 and adam_beta2",
    "eps": "adam_epsilon",
    "weight_decay": "weight_decay",
}


def parse_optim_args(text: str | None, dialect: Dialect = STABLE_SPAM) -> dict[str, Any]:
    """Read `TrainingArguments.optim_args`.

    Args:
        text: entries `name=value`, joined by commas; spaces do not matter; `None` or empty gives `{}`. Names
            are those of the optimizer's keyword arguments, or an alias of the paper or the official code
            (gamma1, gamma2, gamma3, update_proj_gap, total_T). `none` switches a part off. Beside `rank`
            `update_proj_gap` is GaLore's, as in transformers. `layerwise` is for the Trainer.
        dialect: the optimizer's names; default those of `optim="stable_spam"`.

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
    entries = re.sub(r"\s", "", text).split(",") if text and text.strip() else []
    keys = {entry.partition("=")[0] for entry in entries if not entry.lower().endswith("=none")}
    aliases = {key: option for key, option in dialect.aliases.items() if dialect.beside.get(key) not in keys}
    for entry in entries:
        key, equals, value = entry.partition("=")
        if not (key and equals and value):
            raise ValueError(
                f"optim_args must be name=value entries joined by commas, got {entry!r} in {text!r}; "
                "write it as in 'clip_beta=0.999,reset_interval=500'"
            )
        name, place = aliases.get(key, (key, None))
        _claim(key, name, place, given)
        if place is None:
            kwargs[name] = _read(key, value, _known_option(key, name, dialect))
        else:
            pair = list(kwargs.get(name, dialect.pair_defaults[name]))
            pair[place] = _read(key, value, _Option(float, "a number"))
            kwargs[name] = tuple(pair)
    return kwargs


def _claim(key: str, name: str, place: int | None, given: dict[tuple[str, int | None], str]) -> None:
    """Note that `key` sets the option `name` (or one place of it); an error where another key did already."""
    for (other_name, other_place), other_key in given.items():
        if other_name == name and (place is None or other_place is None or place == other_place):
            raise ValueError(f"optim_args sets {name} twice, by {other_key!r} and by {key!r}; leave one of them out")
    given[name, place] = key


def _known_option(key: str, name: str, dialect: Dialect) -> _Option:
    if name in dialect.options:
        return dialect.options[name]
    if key in _FIELDS:
        raise ValueError(f"optim_args does not take {key!r}; set {_FIELDS[key]} in TrainingArguments instead")
    raise ValueError(
        f"optim_args has the unknown option {key!r}{nearest(key, [*dialect.options, *dialect.aliases])}; "
        f"known options: {', '.join(dialect.options)}; aliases: {', '.join(dialect.aliases)}"
    )


def _read(key: str, value: str, option: _Option) -> object:
    try:
        return option.parse(value)
    except (ValueError, KeyError):
        raise ValueError(
            f"optim_args: {key} must be {option.expected}, got {value!r}; leave {key} out for its default"
        ) from None
