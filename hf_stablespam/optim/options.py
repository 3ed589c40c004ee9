"""Checks of optimizer options: every error names the option, the rule, the value and the remedy."""

import math
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from hf_stablespam._names import nearest
from hf_stablespam.optim.low_bit import BITS, require_torchao

AUTO = "auto"
STATE_DTYPES = (torch.float32, torch.bfloat16)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_at_least_zero(name: str, value: Any, remedy: str = "") -> None:
    """A finite number ≥ 0."""
    if not (_is_number(value) and value >= 0):
        raise ValueError(f"{name} must be a number >= 0, got {value!r}{remedy}")


def check_above_zero(name: str, value: Any, remedy: str = "") -> None:
    """A finite number > 0."""
    check_at_least_zero(name, value, remedy)
    if value == 0:
        raise ValueError(f"{name} must be a number > 0, got {value!r}{remedy}")


def check_learning_rate(value: Any) -> None:
    """A finite number ≥ 0, or a tensor with one element (as torch's own optimizers take it)."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"lr must be a number >= 0 or a tensor of one element, got shape {tuple(value.shape)}")
        return
    check_at_least_zero("lr", value, "; pass the learning rate as a positive number such as 1e-3")


def check_beta(name: str, value: Any, remedy: str = "") -> None:
    """A decay rate of a running mean: a number in [0, 1)."""
    if not (_is_number(value) and 0 <= value < 1):
        raise ValueError(f"{name} must be in [0, 1), got {value!r}{remedy}")


def check_beta_pair(name: str, value: Any, remedy: str = "") -> None:
    """Two decay rates."""
    if not (isinstance(value, (tuple, list)) and len(value) == 2):
        raise ValueError(f"{name} must be two numbers in [0, 1), got {value!r}{remedy}")
    for index, beta in enumerate(value):
        check_beta(f"{name}[{index}]", beta, remedy)


def check_interval(name: str, value: Any, remedy: str = "") -> None:
    """A whole number of optimizer steps ≥ 1."""
    if not (_is_whole(value) and value >= 1):
        raise ValueError(f"{name} must be a whole number of steps >= 1, got {value!r}{remedy}")


def check_fraction(name: str, value: Any) -> None:
    """A number in [0, 1]."""
    if not (_is_number(value) and 0 <= value <= 1):
        raise ValueError(f"{name} must be in [0, 1], got {value!r}; 0.5 is the value of the paper's code")


def check_flag(name: str, value: Any, optional: bool = False) -> None:
    """A bool, or ``None`` where that means "choose"."""
    if not (isinstance(value, bool) or (optional and value is None)):
        raise ValueError(f"{name} must be True{', False or None' if optional else ' or False'}, got {value!r}")


def check_parallel_paths(foreach: bool | None, fused: bool | None) -> None:
    """``foreach`` and ``fused`` are two different paths."""
    check_flag("foreach", foreach, optional=True)
    check_flag("fused", fused, optional=True)
    if foreach and fused:
        raise ValueError("foreach and fused must not both be True, got foreach=True, fused=True; set one, or neither")


def check_state_dtype(value: Any) -> None:
    """The dtype of Adam's moments: a floating dtype of torch, or ``None`` for the parameter's."""
    if value is not None and not (isinstance(value, torch.dtype) and value in STATE_DTYPES):
        names = ", ".join(str(dtype) for dtype in STATE_DTYPES)
        raise ValueError(
            f"state_dtype must be one of {names} or None (the parameter's own, float32 for float16), got {value!r}"
        )


def check_state_bits(options: dict[str, Any]) -> None:
    """Bits of Adam's moments: 4, 8 or 32; below 32 with torchao, and by the one path that knows them."""
    bits = options["state_bits"]
    if not (_is_whole(bits) and bits in BITS):
        raise ValueError(f"state_bits must be 4, 8 or 32, got {bits!r}; 32 keeps the moments in state_dtype")
    if bits == 32:
        return
    if options["state_dtype"] is not None:
        raise ValueError(f"state_dtype must be None with state_bits={bits}, got {options['state_dtype']}; set one")
    for path in ("fused", "foreach"):
        if options[path]:
            raise ValueError(f"{path} must be None or False with state_bits={bits}, got True; leave it out")
    require_torchao(bits)


def _check_optional(check: Callable[..., None], name: str, value: Any, part: str) -> None:
    if value is not None:
        check(name, value, f"; None switches {part} off")


def check_adam(options: dict[str, Any]) -> None:
    """Learning rate, betas, eps and weight decay, which both optimizers have from Adam."""
    check_learning_rate(options["lr"])
    check_beta_pair("betas", options["betas"], "; Adam's are (0.9, 0.999)")
    check_at_least_zero("eps", options["eps"], "; 1e-8 is Adam's")
    check_at_least_zero("weight_decay", options["weight_decay"], "; 0 switches it off")


def check_stable_spam(options: dict[str, Any]) -> None:
    """Check the options of one parameter group of `StableSPAM`.

    Raises:
        ValueError: for the first option out of range.
    """
    check_adam(options)
    _check_optional(check_beta, "clip_beta", options["clip_beta"], "clipping")
    _check_optional(check_beta_pair, "norm_betas", options["norm_betas"], "normalising")
    _check_optional(check_interval, "reset_interval", options["reset_interval"], "resets")
    if options["decay_steps"] != AUTO:
        _check_optional(check_interval, "decay_steps", options["decay_steps"], "the decay")
    check_fraction("decay_floor", options["decay_floor"])
    check_flag("maximize", options["maximize"])
    check_parallel_paths(options["foreach"], options["fused"])
    check_state_dtype(options["state_dtype"])
    check_flag("stochastic_rounding", options["stochastic_rounding"])
    check_state_bits(options)


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
