"""From `TrainingArguments` to an optimizer: the Trainer methods that `optim="stable_spam"` and `"spam"` go through."""

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from hf_stablespam.trainer.callbacks.helpers.unwrapping import unwrap
from hf_stablespam.trainer.patching import patch
from hf_stablespam.trainer.registration.converted_weights import load_the_rest
from hf_stablespam.trainer.registration.flat_shards import refuse_flat_shards
from hf_stablespam.trainer.registration.options.check_arguments import check_arguments
from hf_stablespam.trainer.registration.options.galore_groups import (
    PROJECTION_OPTIONS,
    check_layerwise,
    parameter_groups,
    say_what_the_gap_means,
)
from hf_stablespam.trainer.registration.options.lr_scales import (
    asked_scales,
    check_scaled,
    is_scaled,
    scale_learning_rates,
    take_scales,
)
from hf_stablespam.trainer.registration.options.optim_args import SPAM as SPAM_NAME
from hf_stablespam.trainer.registration.options.optim_args import parse_optim_args
from hf_stablespam.trainer.registration.run_length import AUTO, resolve_decay_steps

if TYPE_CHECKING:
    import torch
    from transformers import Trainer, TrainingArguments

    from hf_stablespam.optim import SPAM, StableSPAM

logger = logging.getLogger(__name__)


def optimizer_cls_and_kwargs(
    args: "TrainingArguments", model: "torch.nn.Module | None" = None
) -> "tuple[type[StableSPAM], dict[str, Any]]":
    """The class and the keyword arguments that the Trainer builds its optimizer from.

    Learning rate, betas and epsilon come from their fields in `args`, the weight decay from the groups that the
    Trainer makes, everything else from `args.optim_args`. Unless it says otherwise the decay spans the run:
    `decay_steps="auto"`, replaced by the number of update steps as soon as the Trainer knows it. With `rank` in
    `optim_args` the groups are made here: the layers that `args.optim_target_modules` means, and the others.

    Raises:
        ValueError: `optim_args` cannot be read, or asks for what other arguments rule out; or the run is sharded in a
            way that leaves no whole tensors.
    """
    from hf_stablespam.optim import LayerwiseStableSPAM, StableSPAM

    refuse_flat_shards(args)
    warn_of_global_clipping(args)
    kwargs = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "decay_steps": AUTO,
        **parse_optim_args(args.optim_args),
    }
    say_what_the_gap_means(kwargs, args.optim_args)
    take_scales(kwargs)  # for `create_optimizer`
    layerwise = kwargs.pop("layerwise", False)
    if layerwise:
        check_layerwise(args)
    if kwargs.get("rank") is not None or args.optim_target_modules is not None:
        projection = {name: kwargs.pop(name) for name in PROJECTION_OPTIONS if name in kwargs}
        kwargs["params"] = parameter_groups(args, model, projection)
    return LayerwiseStableSPAM if layerwise else StableSPAM, kwargs


def spam_cls_and_kwargs(
    args: "TrainingArguments", model: "torch.nn.Module | None" = None
) -> "tuple[type[SPAM], dict[str, Any]]":
    """The same for `optim="spam"`. (The paper's ε is 1e-6; the Trainer's own default, `adam_epsilon`, is 1e-8.)

    Raises:
        ValueError: `optim_args` cannot be read.
    """
    from hf_stablespam.optim import SPAM

    warn_of_global_clipping(args, "SPAM")
    kwargs = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        **parse_optim_args(args.optim_args, SPAM_NAME),
    }
    take_scales(kwargs)
    return SPAM, kwargs


# `optim` → what builds it.
BUILDERS: Mapping[str, Callable[["TrainingArguments", Any], tuple[Any, dict[str, Any]]]] = {
    "spam": spam_cls_and_kwargs,
    "stable_spam": optimizer_cls_and_kwargs,
}


def warn_of_global_clipping(args: "TrainingArguments", method: str = "Stable-SPAM") -> None:
    """Say, once per run, that the Trainer's own clipping takes the spikes away before AdaClip sees them."""
    if args.max_grad_norm > 0 and args.process_index == 0:
        logger.warning(
            "max_grad_norm=%s clips the whole gradient before %s sees it: its own spike clipping then "
            "works on shrunken gradients and its thresholds follow them. Set max_grad_norm=0.",
            args.max_grad_norm,
            method,
        )


def warn_of_unread_options(args: "TrainingArguments", given: Any) -> None:
    """Say that `optim_args` counts for nothing where the Trainer has an optimizer that is none of ours.

    Args:
        args: the Trainer's.
        given: its optimizer before it would build one; `None`: none.
    """
    name = getattr(args.optim, "value", args.optim)
    if given is None or name not in BUILDERS or args.process_index:
        return
    from hf_stablespam.optim import SPAM, StableSPAM

    options = parse_optim_args(args.optim_args, name)
    take_scales(options)  # these count for every optimizer
    optimizer = unwrap(given)
    if options and not isinstance(optimizer, (StableSPAM, SPAM)):
        logger.warning(
            "optim=%s and %s in optim_args count for nothing: the Trainer was given its optimizer, %s; leave the"
            " optimizer out, or these options",
            *(name, ", ".join(options), type(optimizer).__name__),
        )


def teach_trainer(trainer_cls: "type[Trainer]") -> None:
    """Teach `Trainer`, and so every subclass, what `optim` means for the names of `BUILDERS`. Twice is harmless."""
    patch(trainer_cls, "get_optimizer_cls_and_kwargs", _knowing)
    patch(trainer_cls, "create_optimizer", _scaling)
    patch(trainer_cls, "create_scheduler", _resolving_auto)
    patch(trainer_cls, "_load_optimizer_and_scheduler", _comparing)
    patch(trainer_cls, "_load_from_checkpoint", _loading_all)
    patch(trainer_cls, "_load_best_model", _loading_all_of_the_best)


def teach_training_arguments(arguments_cls: type) -> None:
    """Check the options of `BUILDERS`' names when arguments are made, and not when training begins."""
    patch(arguments_cls, "__post_init__", _checking)


def teach_callback_handler(handler_cls: type) -> None:
    """Prepare the optimizer at the start of training, and release its parameters at the end. Twice is harmless."""
    patch(handler_cls, "on_train_begin", _preparing)
    patch(handler_cls, "on_train_end", _releasing)


def _checking(original: Any) -> Any:
    def __post_init__(self: "TrainingArguments") -> None:
        original(self)
        check_arguments(self)

    return __post_init__


def _knowing(original: Any) -> Any:
    def get_optimizer_cls_and_kwargs(args: "TrainingArguments", model: Any = None) -> tuple[Any, Any]:
        build = BUILDERS.get(getattr(args.optim, "value", args.optim))
        return build(args, model) if build is not None else original(args, model)

    return get_optimizer_cls_and_kwargs


def _scaling(original: Any) -> Any:
    def create_optimizer(self: "Trainer", *args: Any, **kwargs: Any) -> Any:
        warn_of_unread_options(self.args, self.optimizer)
        optimizer = original(self, *args, **kwargs)
        scales = asked_scales(self.args, self.callback_handler.callbacks)
        if scales:
            if self.lr_scheduler is not None and not is_scaled(optimizer):
                raise ValueError(
                    f"the learning rates of {', '.join(scales)} are set apart before there is a schedule, and this "
                    "Trainer was given one; give the optimizer of that schedule parameter groups of its own"
                )
            model: Any = (args[0] if args else kwargs.get("model")) or self.model
            scale_learning_rates(unwrap(optimizer), model, scales)
        return optimizer

    return create_optimizer


def _resolving_auto(original: Any) -> Any:
    # For scripts with a loop of their own, which call `create_optimizer_and_scheduler` and nothing after it.
    def create_scheduler(self: "Trainer", num_training_steps: int, optimizer: Any = None) -> Any:
        resolve_decay_steps(self.optimizer if optimizer is None else optimizer, num_training_steps)
        return original(self, num_training_steps, optimizer)

    return create_scheduler


def _loading_all(original: Any) -> Any:
    def _load_from_checkpoint(self: "Trainer", resume_from_checkpoint: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, resume_from_checkpoint, *args, **kwargs)
        load_the_rest(self, resume_from_checkpoint)
        return result

    return _load_from_checkpoint


def _loading_all_of_the_best(original: Any) -> Any:
    def _load_best_model(self: "Trainer") -> Any:
        result = original(self)
        load_the_rest(self, self.state.best_model_checkpoint)
        return result

    return _load_best_model


def _comparing(original: Any) -> Any:
    # The one place at which the optimizer is prepared and the checkpoint is not yet loaded into it.
    def _load_optimizer_and_scheduler(self: "Trainer", checkpoint: Any) -> Any:
        if checkpoint is None or self.optimizer is None:
            return original(self, checkpoint)
        from hf_stablespam.trainer.registration.resume import comparing_with_checkpoint

        with comparing_with_checkpoint(self):
            return original(self, checkpoint)

    return _load_optimizer_and_scheduler


def _preparing(original: Any) -> Any:
    # Here the checkpoint is loaded, and every Trainer comes by: one with a `create_scheduler` of its own too.
    def on_train_begin(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        # Imported here, because registering must import neither torch nor accelerate.
        from hf_stablespam.optim.layerwise import LayerwiseStableSPAM, remove_hooks
        from hf_stablespam.trainer.callbacks.helpers import accelerator_watch
        from hf_stablespam.trainer.registration.resume import note_names

        resolve_decay_steps(self.optimizer, state.max_steps, done=state.global_step)
        check_scaled(unwrap(self.optimizer), asked_scales(args, self.callbacks))
        if self.optimizer is not None:
            accelerator_watch.watch_ours(self.optimizer)
            note_names(self.optimizer, self.model)
        remove_hooks(self.model.parameters() if self.model is not None else [])  # of a run that broke off
        if isinstance(optimizer := unwrap(self.optimizer), LayerwiseStableSPAM):
            optimizer.hook_parameters()
        return original(self, args, state, control, **kwargs)

    return on_train_begin


def _releasing(original: Any) -> Any:
    def on_train_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        from hf_stablespam.optim.layerwise import remove_hooks

        remove_hooks(self.model.parameters() if self.model is not None else [])
        return original(self, args, state, control, **kwargs)

    return on_train_end
