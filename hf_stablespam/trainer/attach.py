"""Callbacks that the launcher's flags ask for, on every Trainer that a script builds."""

import functools
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from hf_stablespam.trainer.after_import import after_import


class CallbackOptions(Protocol):
    """The part of the launcher's options that matters here."""

    @property
    def four_bit(self) -> str | None: ...
    @property
    def gradient_norms(self) -> bool: ...
    @property
    def reset_every(self) -> int | None: ...
    @property
    def built(self) -> str: ...


def attach_callbacks(options: CallbackOptions) -> None:
    """Add the callbacks to every Trainer that is built from now on, and leave word when one was."""

    def wrap(trainer_callback: ModuleType) -> None:
        handler_cls = trainer_callback.CallbackHandler
        original = handler_cls.__init__

        @functools.wraps(original)
        def __init__(self: Any, callbacks: list[Any], *args: Any, **kwargs: Any) -> None:
            original(self, [*callbacks, *_wanted(options, callbacks)], *args, **kwargs)
            Path(options.built).touch()

        handler_cls.__init__ = __init__

    after_import("transformers.trainer_callback", wrap)


def _wanted(options: CallbackOptions, present: list[Any]) -> list[Any]:
    """The callbacks that flags ask for; an error where the script has one of that kind already."""
    from hf_stablespam.quant import FourBitConfig
    from hf_stablespam.trainer.four_bit import FourBitCallback
    from hf_stablespam.trainer.gradient_norm import GradientNormCallback
    from hf_stablespam.trainer.momentum_reset import MomentumResetCallback

    wanted: dict[str, Any] = {}
    if options.four_bit is not None:
        config = FourBitConfig(weight=options.four_bit, activation=options.four_bit)
        wanted["--four-bit"] = FourBitCallback(config)
    if options.gradient_norms:
        wanted["--gradient-norms"] = GradientNormCallback()
    if options.reset_every is not None:
        wanted["--reset-every"] = MomentumResetCallback(every=options.reset_every)
    kinds = [callback if isinstance(callback, type) else type(callback) for callback in present]
    for flag, callback in wanted.items():
        if type(callback) in kinds:
            raise ValueError(
                f"{flag} would attach a second {type(callback).__name__}: the script has one; leave {flag} out"
            )
    return list(wanted.values())
