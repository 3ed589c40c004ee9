"""The options of the optimizers: one table for each, from which come defaults, checks, `optim_args` and the docs.

Every error names the option, the rule, the value and the remedy.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_stablespam._names import nearest
from hf_stablespam.optim.galore.projection import PROJECTION_TYPES
from hf_stablespam.optim.state.low_bit import BITS, require_torchao

AUTO = "auto"
STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Rule = Callable[[Any], bool]


class Kind(NamedTuple):
    """What values an option takes."""

    rule: str  # "must be …"
    accepts: Rule
    read: Callable[[str], Any]  # from `optim_args`; raises ValueError or KeyError
    expected: str  # what `read` takes

    def or_none(self) -> "Kind":
        """The same, or ``None``, which the remedy speaks of."""
        return Kind(
            self.rule,
            lambda value: value is None or self.accepts(value),
            lambda text: None if text.lower() == "none" else self.read(text),
            f"{self.expected.replace(' or ', ', ')} or none",
        )


class Option(NamedTuple):
    """One option of an optimizer."""

    default: Any
    kind: Kind
    phrase: str  # what it is
    remedy: str = ""  # how an error goes on
    symbol: str = ""  # the paper's
    aliases: tuple[tuple[str, int | None], ...] = ()  # the official code's names, with the place in a pair


def is_number(value: Any) -> bool:
    """A finite real number, and no bool."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: Any) -> bool:
    """A whole number, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_beta(value: Any) -> bool:
    return is_number(value) and 0 <= value < 1


def _is_learning_rate(value: Any) -> bool:
    return value.numel() == 1 if isinstance(value, Tensor) else is_number(value) and value >= 0


def _pair(text: str) -> tuple[float, float]:
    first, second = text.split(":")
    return float(first), float(second)


BETA = Kind("in [0, 1)", _is_beta, float, "a number")
BETAS = Kind(
    "two numbers in [0, 1)",
    lambda value: isinstance(value, (tuple, list)) and len(value) == 2 and all(map(_is_beta, value)),
    _pair,
    "two numbers joined by a colon, such as 0.7:0.9,",
)
LEARNING_RATE = Kind("a number >= 0", _is_learning_rate, float, "a number")
AT_LEAST_ZERO = Kind("a number >= 0", lambda value: is_number(value) and value >= 0, float, "a number")
ABOVE_ZERO = Kind("a number > 0", lambda value: is_number(value) and value > 0, float, "a number")
SHARE = Kind("in (0, 1]", lambda value: is_number(value) and 0 < value <= 1, float, "a number")
FRACTION = Kind("in [0, 1]", lambda value: is_number(value) and 0 <= value <= 1, float, "a number")
STEPS = Kind("a whole number of steps >= 1", lambda value: is_whole(value) and value >= 1, int, "an integer")
STEPS_OR_AUTO = Kind(
    STEPS.rule,
    lambda value: STEPS.accepts(value) or (isinstance(value, str) and value == AUTO),
    lambda text: AUTO if text.lower() == AUTO else int(text),
    "an integer or auto",
)
WHOLE = Kind("a whole number >= 1", lambda value: is_whole(value) and value >= 1, int, "an integer")
COUNT = Kind("a whole number >= 0", lambda value: is_whole(value) and value >= 0, int, "an integer")
FLAG = Kind(
    "True or False",
    lambda value: isinstance(value, bool),
    lambda text: {"true": True, "false": False}[text.lower()],
    "true or false",
)
CHOICE = FLAG.or_none()._replace(rule="True, False or None")
STATE_BITS = Kind("4, 8 or 32", lambda value: is_whole(value) and value in BITS, int, "an integer")
STATE_DTYPE = Kind(
    "one of torch.float32, torch.bfloat16 or None (the parameter's own, float32 for float16)",
    lambda value: value is None or (isinstance(value, torch.dtype) and value in STATE_DTYPES.values()),
    lambda text: None if text.lower() == "none" else STATE_DTYPES[text.lower()],
    "float32, bfloat16 or none",
)
PROJECTION = Kind(
    f"one of {', '.join(PROJECTION_TYPES)}",
    lambda value: value in PROJECTION_TYPES,
    str,
    "std, reverse_std, left, right or full",
)

_ADAM: Mapping[str, Option] = {
    "lr": Option(
        1e-3, LEARNING_RATE, "learning rate", "; pass the learning rate as a positive number such as 1e-3", symbol="η"
    ),
    "betas": Option((0.9, 0.999), BETAS, "decay rates of Adam's moments", "; Adam's are (0.9, 0.999)", symbol="β1, β2"),
    "eps": Option(1e-8, AT_LEAST_ZERO, "in the denominators of Adam and AdaGN", "; 1e-8 is Adam's", symbol="ε"),
    "weight_decay": Option(0.0, AT_LEAST_ZERO, "decoupled weight decay", "; 0 switches it off", symbol="λ"),
}
_MAXIMIZE = Option(False, FLAG, "climb instead of descend")
_RESETS = "; None switches resets off"

STABLE_SPAM: Mapping[str, Option] = {
    **_ADAM,
    "clip_beta": Option(
        *(0.999, BETA.or_none(), "decay rate of the running largest entry; `none`: no clipping"),
        *("; None switches clipping off", "γ3", (("gamma3", None),)),
    ),
    "norm_betas": Option(
        *((0.7, 0.9), BETAS.or_none(), "decay rates of the running norm and squared norm; `none`: no normalising"),
        *("; None switches normalising off", "γ1, γ2", (("gamma1", 0), ("gamma2", 1))),
    ),
    "reset_interval": Option(
        *(1000, STEPS.or_none(), "steps between resets of the moments; `none`: no resets"),
        *(_RESETS, "ΔT", (("update_proj_gap", None),)),
    ),
    "decay_steps": Option(
        *(None, STEPS_OR_AUTO.or_none(), "steps over which β1 and γ1 decay; `auto` in the Trainer: the run's"),
        *("; None switches the decay off", "D", (("total_T", None),)),
    ),
    "decay_floor": Option(0.5, FRACTION, "where the decay ends", "; 0.5 is the value of the paper's code", symbol="f"),
    "maximize": _MAXIMIZE,
    "foreach": Option(None, CHOICE, "force or forbid PyTorch's multi-tensor operations; `none`: choose"),
    "fused": Option(None, CHOICE, "force or forbid compiled kernels; `none`: choose"),
    "state_dtype": Option(None, STATE_DTYPE, "dtype of the moments; `none`: the parameter's"),
    "stochastic_rounding": Option(False, FLAG, "round bfloat16 weights at random"),
    "state_bits": Option(32, STATE_BITS, "8 or 4: moments in so many bits", "; 32 keeps the moments in state_dtype"),
    "rank": Option(None, WHOLE.or_none(), "directions kept", "; None switches the projection off", symbol="r"),
    "update_proj_gap": Option(200, STEPS, "steps between new directions", "; 200 is GaLore's", symbol="T"),
    "scale": Option(0.25, ABOVE_ZERO, "multiplies the update of projected matrices", "; 0.25 is GaLore's", symbol="α"),
    "proj_type": Option(
        "std",
        PROJECTION,
        f"which side is projected: {', '.join(f'`{kind}`' for kind in PROJECTION_TYPES)}",
        "; std is GaLore's",
    ),
    "reset_on_switch": Option(False, FLAG, "reset a matrix's moments when it gets new directions"),
}

SPAM: Mapping[str, Option] = {
    **_ADAM,
    "eps": _ADAM["eps"]._replace(default=1e-6),
    "threshold": Option(
        *(5000.0, ABOVE_ZERO.or_none(), "how many times its second moment a squared entry may be"),
        *("; None switches clipping off", "θ"),
    ),
    "clip_delay": Option(20, COUNT, "gradients in the moments before clipping begins"),
    "reset_interval": Option(
        *(500, STEPS.or_none(), "steps between resets", _RESETS, "ΔT"),
        (("DeltaT", None), ("update_proj_gap", None)),
    ),
    "warmup_steps": Option(
        150, COUNT, "steps of the warm-up after a reset", symbol="N", aliases=(("warmup_epoch", None),)
    ),
    "density": Option(
        1.0, SHARE, "share of the entries that is trained between two resets", "; 1.0 trains every entry"
    ),
    "seed": Option(0, COUNT, "of the random subsets"),
    "maximize": _MAXIMIZE,
}


def check_options(table: Mapping[str, Option], options: Mapping[str, Any]) -> None:
    """Check the options of one parameter group.

    Raises:
        ValueError: for the first option out of range, or two that exclude each other.
        ImportError: for ``state_bits`` below 32 without torchao.
    """
    for name, option in table.items():
        if name in options:
            check_option(name, option, options[name])
    for check in (_check_one_path, _check_state_bits, _check_rank):
        check(options)


def check_option(name: str, option: Option, value: Any) -> None:
    """A value is in the range of an option.

    Raises:
        ValueError: if it is not.
    """
    if option.kind.accepts(value):
        return
    if name == "lr" and isinstance(value, Tensor):
        raise ValueError(f"lr must be a number >= 0 or a tensor of one element, got shape {tuple(value.shape)}")
    rule = option.kind.rule
    if rule == BETAS.rule and isinstance(value, (tuple, list)) and len(value) == 2:
        index = 1 if _is_beta(value[0]) else 0
        name, rule, value = f"{name}[{index}]", BETA.rule, value[index]
    raise ValueError(f"{name} must be {rule}, got {value!r}{option.remedy}")


def _check_one_path(options: Mapping[str, Any]) -> None:
    if options.get("foreach") and options.get("fused"):
        raise ValueError("foreach and fused must not both be True, got foreach=True, fused=True; set one, or neither")


def _check_state_bits(options: Mapping[str, Any]) -> None:
    bits = options.get("state_bits", 32)
    if bits == 32:
        return
    if options["state_dtype"] is not None:
        raise ValueError(f"state_dtype must be None with state_bits={bits}, got {options['state_dtype']}; set one")
    _check_no_path(options, f"state_bits={bits}")
    require_torchao(bits)


def _check_rank(options: Mapping[str, Any]) -> None:
    if options.get("rank") is not None:
        _check_no_path(options, f"rank={options['rank']}")


def _check_no_path(options: Mapping[str, Any], beside: str) -> None:
    for path in ("fused", "foreach"):
        if options[path]:
            raise ValueError(f"{path} must be None or False with {beside}, got True; leave it out")


def check_targets(group: Mapping[str, Any]) -> None:
    """A group that names a rank has a matrix to project.

    Raises:
        ValueError: if it has none.
    """
    if group.get("rank") is not None and not any(param.dim() == 2 for param in group["params"]):
        raise ValueError(f"rank={group['rank']} needs a 2-dimensional parameter in its group, but there is none")


def check_group_names(group: dict[str, Any], known: Iterable[str]) -> None:
    """A parameter group may carry foreign entries (``initial_lr``, ``name``), but no misspelt option.

    Raises:
        TypeError: for an entry that is nearly, but not quite, the name of an option.
    """
    known = list(known)
    for name in group:
        if name not in (*known, "params", "param_names", "initial_lr") and (hint := nearest(name, known, cutoff=0.8)):
            raise TypeError(f"unknown option {name!r} in a parameter group{hint}; known options: {', '.join(known)}")


def check_real(params: Iterable[Tensor]) -> None:
    """The parameters of one group are real.

    Raises:
        ValueError: for the first complex one.
    """
    for index, param in enumerate(params):
        if param.is_complex():
            raise ValueError(
                f"parameters must be real, got {param.dtype} for shape {tuple(param.shape)}, "
                f"parameter {index} of the group; optimize torch.view_as_real(parameter) instead"
            )


def check_dense(param: Tensor) -> None:
    """The gradient of a parameter, if it has one, is dense.

    Raises:
        ValueError: if it is not.
    """
    if param.grad is not None and (layout := param.grad.layout) != torch.strided:
        raise ValueError(
            f"gradients must be dense, got {layout} for a parameter of shape {tuple(param.shape)}; "
            "build the embedding with sparse=False"
        )
