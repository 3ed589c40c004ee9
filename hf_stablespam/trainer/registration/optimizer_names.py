"""Make `optim="stable_spam"` and `"spam"` choices of transformers, as if they were its own."""

import sys
from types import ModuleType
from typing import Any

from hf_stablespam.trainer.patching import undo_patches
from hf_stablespam.trainer.registration import factory
from hf_stablespam.trainer.registration.adapters import teach_tuners
from hf_stablespam.trainer.registration.after_import import after_import, forget_hooks
from hf_stablespam.trainer.registration.quantization_config import forget_quantizers, teach_quantizers


def register() -> None:
    """Register `optim="stable_spam"` and `"spam"` with transformers, and `FourBitConfig` as a `quantization_config`.

    `import hf_stablespam` calls this. transformers is not imported here: what is already loaded is taught at
    once, the rest when it is loaded. A command line parser (`HfArgumentParser`) that was built before does not
    know the name. Calling it again does nothing.

    Example:
        >>> from hf_stablespam import register
        >>> register()
        >>> from transformers import TrainingArguments
        >>> TrainingArguments("out", optim="stable_spam", max_grad_norm=0, report_to="none").optim.value
        'stable_spam'
    """
    after_import("transformers.training_args", _add_optimizer_name)
    after_import("transformers.trainer", _teach_trainer)
    after_import("transformers.trainer_callback", _teach_callback_handler)
    after_import("transformers.quantizers.auto", teach_quantizers)
    after_import("peft.tuners.tuners_utils", teach_tuners)


def unregister() -> None:
    """Undo `register`, and everything that callbacks and the launcher wrapped: transformers is as it was found.

    A Trainer that was built before keeps its optimizer, but callbacks that read the norm before clipping, or report
    before others, go without. `register()` makes the names known again.

    Example:
        >>> from hf_stablespam import register, unregister
        >>> unregister()
        >>> from transformers.training_args import OptimizerNames
        >>> "stable_spam" in [name.value for name in OptimizerNames]
        False
        >>> register()
        >>> "stable_spam" in [name.value for name in OptimizerNames]
        True
    """
    undo_patches()
    forget_hooks()
    forget_quantizers()
    training_args = sys.modules.get("transformers.training_args")
    if training_args is not None:
        for name in factory.BUILDERS:
            _remove_member(training_args.OptimizerNames, name)


def _add_optimizer_name(training_args: ModuleType) -> None:
    factory.teach_training_arguments(training_args.TrainingArguments)
    names = training_args.OptimizerNames
    for name in factory.BUILDERS:
        if name not in names._value2member_map_:
            add_member(names, name)


def _teach_trainer(trainer: ModuleType) -> None:
    factory.teach_trainer(trainer.Trainer)


def _teach_callback_handler(trainer_callback: ModuleType) -> None:
    factory.teach_callback_handler(trainer_callback.CallbackHandler)


def add_member(enum: Any, value: str) -> None:
    """Add `value` to a string enum: argparse's choices and `--help` iterate over the enum's own tables."""
    name = value.upper()
    member: Any = str.__new__(enum, value)
    member._name_ = name
    member._value_ = value
    member.__objclass__ = enum
    member._sort_order_ = len(enum._member_names_)
    # `training_args.bin` must open in a process that never imported this package: there the name is a plain str.
    member.__reduce_ex__ = lambda protocol: (str, (value,))
    member.__deepcopy__ = lambda memo: member
    type.__setattr__(enum, name, member)
    enum._member_names_.append(name)
    enum._member_map_[name] = member
    enum._value2member_map_[value] = member
    hashable_values = getattr(enum, "_hashable_values_", None)  # from Python 3.13 on
    if hashable_values is not None:
        hashable_values.append(value)


def _remove_member(enum: Any, value: str) -> None:
    member = enum._value2member_map_.pop(value, None)
    if member is None:
        return
    type.__delattr__(enum, member._name_)
    enum._member_names_.remove(member._name_)
    del enum._member_map_[member._name_]
    hashable_values = getattr(enum, "_hashable_values_", None)
    if hashable_values is not None:
        hashable_values.remove(value)
