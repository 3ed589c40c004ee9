"""Callbacks that the launcher's flags ask for, on every Trainer that a script builds."""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hf_stablespam.trainer.patching import patch
from hf_stablespam.trainer.registration.after_import import after_import

if TYPE_CHECKING:
    from hf_stablespam.quant import FourBitConfig


@dataclass(frozen=True)
class LaunchOptions:
    """What the launcher's flags ask for, here and in every process that the script starts.

    Args:
        four_bit: what `four_bit_config` reads, `None` to leave the linear layers alone.
        gradient_norms: attach a `GradientNormCallback`.
        reset_every: attach a `MomentumResetCallback` with this interval in update steps, `None` for none.
        built: a file that each process that builds a Trainer creates.
    """

    four_bit: str | None = None
    gradient_norms: bool = False
    reset_every: int | None = None
    built: str = ""

    @property
    def flags(self) -> list[str]:
        """The flags that ask for a callback, as they are written."""
        wanted = {
            "--four-bit": self.four_bit is not None,
            "--gradient-norms": self.gradient_norms,
            "--reset-every": self.reset_every is not None,
        }
        return [flag for flag, is_wanted in wanted.items() if is_wanted]


def attach_callbacks(options: LaunchOptions) -> None:
    """Add the callbacks to every Trainer that is built from now on, and leave word when one was.

    Asked again, for example by a launcher under a launcher, the last options count.
    """

    def wrap(trainer_callback: ModuleType) -> None:
        patch(trainer_callback.CallbackHandler, "__init__", attaching, again=True)

    def attaching(original: Any) -> Any:
        def __init__(self: Any, callbacks: list[Any], *args: Any, **kwargs: Any) -> None:
            original(self, [*callbacks, *_wanted(options, callbacks)], *args, **kwargs)
            # A process that outlives the launcher, or runs on another node, has no such folder, and nobody to tell.
            with contextlib.suppress(OSError):
                Path(options.built).touch()

        return __init__

    after_import("transformers.trainer_callback", wrap)


def four_bit_config(text: str) -> "FourBitConfig":
    """The configuration that the text after `--four-bit` stands for.

    Args:
        text: fields of `FourBitConfig` as a JSON object, or one word, the format: weights and activations share it,
            but for `int4_asym` and `int4_signed`: a zero point or a sign of the scale is of use for weights, and
            activations keep the symmetric grid, as in the paper.

    Raises:
        ValueError: an unknown format or field, or no JSON object.
    """
    from hf_stablespam.quant import FourBitConfig

    if text.lstrip().startswith("{"):
        try:
            return FourBitConfig.from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise ValueError(f"must be a format or a JSON object, got {text!r}, which is not JSON: {error}") from None
    return FourBitConfig(weight=text, activation="int4" if text in ("int4_asym", "int4_signed") else text)


def _wanted(options: LaunchOptions, present: list[Any]) -> list[Any]:
    """The callbacks that flags ask for; an error where the script has one of that kind already."""
    from hf_stablespam.trainer.callbacks.four_bit import FourBitCallback
    from hf_stablespam.trainer.callbacks.gradient_norm import GradientNormCallback
    from hf_stablespam.trainer.callbacks.momentum_reset import MomentumResetCallback

    wanted: dict[str, Any] = {}
    if options.four_bit is not None:
        wanted["--four-bit"] = FourBitCallback(four_bit_config(options.four_bit))
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
