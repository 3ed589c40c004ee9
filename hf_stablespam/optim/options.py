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
from hf_stablespam._sharded import is_sharded
from hf_stablespam.optim.galore.projection import PROJECTION_TYPES
from hf_stablespam.optim.state.low_bit import BITS, require_torchao

AUTO = "auto"
STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Kind(NamedTuple):
    """What values an option takes."""

    rule: str  # "must be …"
    accepts: Callable[[Any], bool]
    read: Callable[[str], Any]  # from `optim_args`; raises ValueError or KeyError
    expected: str  # what `read` takes

    def or_none(self) -> "Kind":
        """The same, or ``None``, which the remedy speaks of."""
        return self._replace(
            accepts=lambda value: value is None or self.accepts(value),
            read=lambda text: None if text.lower() == "none" else self.read(text),
            expected=f"{self.expected.replace(' or ', ', ')} or none",
        )


class Option(NamedTuple):
    """One option of an optimizer."""

    default: Any
    kind: Kind
    phrase: str  # what it is
    remedy: str = ""  # how an error goes on
    symbol: str = ""  # the paper's
    aliases: tuple[tuple[str, int | None], ...] = ()  # the official code's names, with the place in a pair


def _number(rule: str, is_in: Callable[[Any], bool], kind: Any = Real) -> Kind:
    """Finite numbers of a kind, but no bool, for which something holds."""

    def accepts(value: Any) -> bool:
        return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value) and is_in(value)

    return Kind(rule, accepts, *((int, "an integer") if kind is int else (float, "a number")))


def _is_pair(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2


def _pair(text: str) -> tuple[float, float]:
    first, second = text.split(":")
    return float(first), float(second)


BETA = _number("in [0, 1)", lambda value: 0 <= value < 1)
BETAS = Kind(
    "two numbers in [0, 1)",
    lambda value: _is_pair(value) and all(map(BETA.accepts, value)),
    _pair,
    "two numbers joined by a colon, such as 0.7:0.9,",
)
AT_LEAST_ZERO = _number("a number >= 0", lambda value: value >= 0)
LEARNING_RATE = AT_LEAST_ZERO._replace(
    accepts=lambda value: value.numel() == 1 if isinstance(value, Tensor) else AT_LEAST_ZERO.accepts(value)
)
ABOVE_ZERO = _number("a number > 0", lambda value: value > 0)
SHARE = _number("in (0, 1]", lambda value: 0 < value <= 1)
FRACTION = _number("in [0, 1]", lambda value: 0 <= value <= 1)
STEPS = _number("a whole number of steps >= 1", lambda value: value >= 1, int)
STEPS_OR_AUTO = Kind(
    STEPS.rule,
    lambda value: STEPS.accepts(value) or (isinstance(value, str) and value == AUTO),
    lambda text: AUTO if text.lower() == AUTO else int(text),
    "an integer or auto",
)
WHOLE = _number("a whole number >= 1", lambda value: value >= 1, int)
COUNT = _number("a whole number >= 0", lambda value: value >= 0, int)
FLAG = Kind(
    "True or False",
    lambda value: isinstance(value, bool),
    lambda text: {"true": True, "false": False}[text.lower()],
    "true or false",
)
CHOICE = FLAG.or_none()._replace(rule="True, False or None")
STATE_BITS = _number("4, 8 or 32", BITS.__contains__, int)
STATE_DTYPE = Kind(
    "one of torch.float32, torch.bfloat16 or None (the parameter's own, float32 for float16)",
    lambda value: value is None or (isinstance(value, torch.dtype) and value in STATE_DTYPES.values()),
    lambda text: None if text.lower() == "none" else STATE_DTYPES[text.lower()],
    "float32, bfloat16 or none",
)
_SIDES = ", ".join(PROJECTION_TYPES)
PROJECTION = Kind(f"one of {_SIDES}", lambda value: value in PROJECTION_TYPES, str, " or ".join(_SIDES.rsplit(", ", 1)))

_NO_RESETS = "; None switches resets off"
_LR = Option(1e-3, LEARNING_RATE, "learning rate", "; pass the learning rate as a positive number such as 1e-3", "η")
_BETAS = Option((0.9, 0.999), BETAS, "decay rates of Adam's moments", "; Adam's are (0.9, 0.999)", "β1, β2")
_EPS = Option(1e-8, AT_LEAST_ZERO, "in the denominators of Adam and AdaGN", "; 1e-8 is Adam's", "ε")
_WEIGHT_DECAY = Option(0.0, AT_LEAST_ZERO, "decoupled weight decay", "; 0 switches it off", "λ")
_CLIP = "decay rate of the running largest entry; `none`: no clipping"
_NORM = "decay rates of the running norm and squared norm; `none`: no normalising"
_RESET = "steps between resets of the moments; `none`: no resets"
_DECAY = "steps over which β1 and γ1 decay; `auto` in the Trainer: the run's"
_SIDE = f"which side is projected: `{'`, `'.join(PROJECTION_TYPES)}`"

STABLE_SPAM: Mapping[str, Option] = {
    "lr": _LR,
    "betas": _BETAS,
    "eps": _EPS,
    "weight_decay": _WEIGHT_DECAY,
    "clip_beta": Option(0.999, BETA.or_none(), _CLIP, "; None switches clipping off", "γ3", (("gamma3", None),)),
    "norm_betas": Option(
        *((0.7, 0.9), BETAS.or_none(), _NORM, "; None switches normalising off", "γ1, γ2"),
        aliases=(("gamma1", 0), ("gamma2", 1)),
    ),
    "reset_interval": Option(1000, STEPS.or_none(), _RESET, _NO_RESETS, "ΔT", (("update_proj_gap", None),)),
    "decay_steps": Option(
        None, STEPS_OR_AUTO.or_none(), _DECAY, "; None switches the decay off", "D", (("total_T", None),)
    ),
    "decay_floor": Option(0.5, FRACTION, "where the decay ends", "; 0.5 is the value of the paper's code", "f"),
    "maximize": Option(False, FLAG, "climb instead of descend"),
    "foreach": Option(None, CHOICE, "force or forbid PyTorch's multi-tensor operations; `none`: choose"),
    "fused": Option(None, CHOICE, "force or forbid compiled kernels; `none`: choose"),
    "state_dtype": Option(None, STATE_DTYPE, "dtype of the moments; `none`: the parameter's"),
    "stochastic_rounding": Option(False, FLAG, "round bfloat16 weights at random"),
    "state_bits": Option(32, STATE_BITS, "8 or 4: moments in so many bits", "; 32 keeps the moments in state_dtype"),
    "rank": Option(None, WHOLE.or_none(), "directions kept", "; None switches the projection off", "r"),
    "update_proj_gap": Option(200, STEPS, "steps between new directions", "; 200 is GaLore's", "T"),
    "scale": Option(0.25, ABOVE_ZERO, "multiplies the update of projected matrices", "; 0.25 is GaLore's", "α"),
    "proj_type": Option("std", PROJECTION, _SIDE, "; std is GaLore's"),
    "reset_on_switch": Option(False, FLAG, "reset a matrix's moments when it gets new directions"),
}

_THRESHOLD = "how many times its second moment a squared entry may be"
_OF_RESET = (("DeltaT", None), ("update_proj_gap", None))
_DENSITY = "share of the entries that is trained between two resets"

SPAM: Mapping[str, Option] = {
    "lr": _LR,
    "betas": _BETAS,
    "eps": _EPS._replace(default=1e-6),
    "weight_decay": _WEIGHT_DECAY,
    "threshold": Option(5000.0, ABOVE_ZERO.or_none(), _THRESHOLD, "; None switches clipping off", "θ"),
    "clip_delay": Option(20, COUNT, "gradients in the moments before clipping begins"),
    "reset_interval": Option(500, STEPS.or_none(), "steps between resets", _NO_RESETS, "ΔT", _OF_RESET),
    "warmup_steps": Option(150, COUNT, "steps of the warm-up after a reset", "", "N", (("warmup_epoch", None),)),
    "density": Option(1.0, SHARE, _DENSITY, "; 1.0 trains every entry"),
    "seed": Option(0, COUNT, "of the random subsets"),
    "maximize": STABLE_SPAM["maximize"],
}


def check_options(table: Mapping[str, Option], options: Mapping[str, Any]) -> None:
    """Check the options of one parameter group.

    Raises:
        ValueError: for the first option out of range, or two that exclude each other.
        ImportError: for ``state_bits`` below 32 without torchao.
    """
    for name, option in table.items():
        if name in options and not option.kind.accepts(options[name]):
            raise ValueError(_refusal(name, option, options[name]))
    if options.get("foreach") and options.get("fused"):
        raise ValueError("foreach and fused must not both be True, got foreach=True, fused=True; set one, or neither")
    bits, rank = options.get("state_bits", 32), options.get("rank")
    if bits != 32 and options["state_dtype"] is not None:
        raise ValueError(f"state_dtype must be None with state_bits={bits}, got {options['state_dtype']}; set one")
    for beside in [f"state_bits={bits}"] * (bits != 32) + [f"rank={rank}"] * (rank is not None):
        for path in ("fused", "foreach"):
            if options[path]:
                raise ValueError(f"{path} must be None or False with {beside}, got True; leave it out")
    if bits != 32:
        require_torchao(bits)


def _refusal(name: str, option: Option, value: Any) -> str:
    if name == "lr" and isinstance(value, Tensor):
        return f"lr must be a number >= 0 or a tensor of one element, got shape {tuple(value.shape)}"
    rule = option.kind.rule
    if rule == BETAS.rule and _is_pair(value):
        index = 1 if BETA.accepts(value[0]) else 0
        name, rule, value = f"{name}[{index}]", BETA.rule, value[index]
    return f"{name} must be {rule}, got {value!r}{option.remedy}"


def check_group(group: Mapping[str, Any]) -> None:
    """The parameters of one group can be trained with its options.

    Raises:
        ValueError: for a complex parameter, or if none can be projected to the group's rank.
    """
    for index, param in enumerate(group["params"]):
        if param.is_complex():
            raise ValueError(
                f"parameters must be real, got {param.dtype} for shape {tuple(param.shape)}, "
                f"parameter {index} of the group; optimize torch.view_as_real(parameter) instead"
            )
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


def check_gradient(param: Tensor, whole: str = "") -> None:
    """The gradient of a parameter, if it has one, is dense; and the parameter whole, if ``whole`` says who needs that.

    Raises:
        ValueError: if it is not.
    """
    if param.grad is not None and (layout := param.grad.layout) != torch.strided:
        raise ValueError(
            f"gradients must be dense, got {layout} for a parameter of shape {tuple(param.shape)}; "
            "build the embedding with sparse=False"
        )
    if whole and param.grad is not None and is_sharded(param):
        raise ValueError(
            f"{whole} needs whole parameters, got a sharded one (DTensor) of shape {tuple(param.shape)}; "
            "train with DDP, or use StableSPAM"
        )
