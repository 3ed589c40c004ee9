"""From `TrainingArguments` to `StableSPAM`: the Trainer methods that `optim="stable_spam"` goes through."""

import functools
import logging
from typing import TYPE_CHECKING, Any

from hf_stablespam.trainer.options import parse_optim_args
from hf_stablespam.trainer.sharding import refuse_flat_shards

if TYPE_CHECKING:
    import torch
    from transformers import Trainer, TrainingArguments

    from hf_stablespam.optim import StableSPAM

logger = logging.getLogger(__name__)

_MARK = "_hf_stablespam"


def optimizer_cls_and_kwargs(args: "TrainingArguments") -> "tuple[type[StableSPAM], dict[str, Any]]":
    """The class and the keyword arguments that the Trainer builds its optimizer from.

    Learning rate, betas and epsilon come from their fields in `args`, the weight decay from the groups that the
    Trainer makes, everything else from `args.optim_args`. Unless it says otherwise the decay spans the run:
    `decay_steps="auto"`, replaced by the number of update steps as soon as the Trainer knows it.

    Raises:
        ValueError: `optim_args` cannot be read; or the run is sharded in a way that leaves no whole tensors.
    """
    from hf_stablespam.optim import StableSPAM

    refuse_flat_shards(args)
    if args.max_grad_norm > 0 and args.process_index == 0:
        logger.warning(
            "max_grad_norm=%s clips the whole gradient before Stable-SPAM sees it: its own spike clipping then "
            "works on shrunken gradients and its thresholds follow them. Set max_grad_norm=0.",
            args.max_grad_norm,
        )
    kwargs = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "decay_steps": "auto",
        **parse_optim_args(args.optim_args),
    }
    return StableSPAM, kwargs


def set_decay_steps(optimizer: "torch.optim.Optimizer", num_training_steps: int) -> None:
    """Replace `decay_steps="auto"` in the optimizer's groups by the run's number of update steps."""
    for group in optimizer.param_groups:
        if group.get("decay_steps") == "auto":
            group["decay_steps"] = num_training_steps


def wrap_trainer(trainer_cls: "type[Trainer]", name: str) -> None:
    """Teach `Trainer`, and so every subclass, that `optim=name` means `StableSPAM`. Twice is harmless."""
    if getattr(trainer_cls.get_optimizer_cls_and_kwargs, _MARK, False):
        return
    trainer_cls.get_optimizer_cls_and_kwargs = staticmethod(  # type: ignore[method-assign]
        _knowing(trainer_cls.get_optimizer_cls_and_kwargs, name)
    )
    trainer_cls.create_scheduler = _resolving_auto(trainer_cls.create_scheduler)  # type: ignore[method-assign]


def _knowing(original: Any, name: str) -> Any:
    @functools.wraps(original)
    def get_optimizer_cls_and_kwargs(args: "TrainingArguments", model: Any = None) -> tuple[Any, Any]:
        return optimizer_cls_and_kwargs(args) if args.optim == name else original(args, model)

    setattr(get_optimizer_cls_and_kwargs, _MARK, True)
    return get_optimizer_cls_and_kwargs


def _resolving_auto(original: Any) -> Any:
    # The one place that every supported version goes through with the number of steps known, the optimizer
    # built, and the checkpoint not yet loaded: a resumed run therefore keeps the value that it began with.
    @functools.wraps(original)
    def create_scheduler(self: "Trainer", num_training_steps: int, optimizer: Any = None) -> Any:
        target = self.optimizer if optimizer is None else optimizer
        if target is not None:
            set_decay_steps(target, num_training_steps)
        return original(self, num_training_steps, optimizer)

    return create_scheduler


def wrap_callback_handler(handler_cls: Any) -> None:
    """Resolve `decay_steps="auto"` at the start of training where it still stands. Twice is harmless.

    A subclass of the Trainer with a `create_scheduler` of its own never comes through ours.
    """
    original = handler_cls.on_train_begin
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def on_train_begin(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self.optimizer is not None:
            set_decay_steps(self.optimizer, state.max_steps)
        return original(self, args, state, control, **kwargs)

    setattr(on_train_begin, _MARK, True)
    handler_cls.on_train_begin = on_train_begin
