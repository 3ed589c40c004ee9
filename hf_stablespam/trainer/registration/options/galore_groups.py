"""`optim="stable_spam"` with `rank=…`: which weights are projected, and the update during the backward pass."""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)

PROJECTION_OPTIONS = ("rank", "update_proj_gap", "scale", "proj_type", "reset_on_switch")


def parameter_groups(
    args: "TrainingArguments", model: "nn.Module | None", projection: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Parameter groups of a run with GaLore: the targets with the options of the projection, and the rest without.

    Weight decay is shared out as the Trainer does: none for biases and norms.

    Args:
        args: says in `optim_target_modules` which linear layers are targets, as for transformers' own GaLore: a
            regular expression, a list of names or parts of names, or "all-linear".
        model: the model to train.
        projection: options of `StableSPAM` for the targets: `rank` and what goes with it.

    Raises:
        ValueError: `rank` without `optim_target_modules`, the other way round, or targets that no layer matches.
    """
    check_rank_and_targets(args, projection.get("rank"))
    if model is None:
        raise ValueError("rank in optim_args needs the model; call get_optimizer_cls_and_kwargs(args, model)")
    assert args.optim_target_modules is not None
    targets = target_names(model, args.optim_target_modules)
    decaying = _decaying_names(model)
    groups: dict[tuple[bool, bool], list[Any]] = {}
    for name, param in model.named_parameters():
        if param.requires_grad:
            groups.setdefault((name in targets, name in decaying), []).append(param)
    return [
        {
            "params": params,
            "weight_decay": args.weight_decay if decays else 0.0,
            **(projection if is_target else {}),
        }
        for (is_target, decays), params in sorted(groups.items(), key=lambda item: item[0])
    ]


def check_rank_and_targets(args: "TrainingArguments", rank: int | None) -> None:
    """`rank` and `optim_target_modules` need each other.

    Raises:
        ValueError: one of them alone.
    """
    if rank is not None and args.optim_target_modules is None:
        raise ValueError(
            f"rank={rank} in optim_args needs optim_target_modules, the layers to project; "
            "set it to 'all-linear', a regular expression or a list of names"
        )
    if rank is None and args.optim_target_modules is not None:
        raise ValueError(
            f"optim_target_modules={args.optim_target_modules!r} needs rank in optim_args, the directions to project "
            "to, such as optim_args='rank=128'"
        )


def target_names(model: "nn.Module", targets: str | list[str]) -> set[str]:
    """Names of the weights of the linear layers that `optim_target_modules` means.

    Raises:
        ValueError: if it means none.
    """
    from torch import nn
    from transformers.trainer_utils import check_target_module_exists

    every_linear = isinstance(targets, str) and targets.replace("_", "-") == "all-linear"
    names = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (every_linear or check_target_module_exists(targets, name))
    }
    trainable = {name for name, param in model.named_parameters() if param.requires_grad}
    if not names & trainable:
        raise ValueError(
            f"optim_target_modules must match a trainable linear layer, got {targets!r}, which matches none; "
            "'all-linear' means every linear layer"
        )
    return names & trainable


def check_layerwise(args: "TrainingArguments") -> None:
    """What an update during the backward pass cannot be combined with.

    Raises:
        ValueError: for the first such argument.
    """
    wants = "optim_args has layerwise=true, which updates during the backward pass"
    if args.gradient_accumulation_steps != 1:
        raise ValueError(
            f"gradient_accumulation_steps must be 1, got {args.gradient_accumulation_steps}: {wants}; "
            "raise per_device_train_batch_size instead, or leave layerwise out"
        )
    if args.max_grad_norm > 0:
        raise ValueError(
            f"max_grad_norm must be 0, got {args.max_grad_norm}: {wants}, and the norm of the whole gradient is known "
            "only after it; set max_grad_norm=0"
        )
    if args.fp16:
        raise ValueError(f"fp16 must be False: {wants}, before the scaled gradients could be unscaled; use bf16")
    if args.parallel_mode.value == "distributed":
        raise ValueError(f"layerwise=true runs on one process, got {args.world_size}: {wants}; leave layerwise out")


def say_what_the_gap_means(options: Mapping[str, Any], text: str | None) -> None:
    """One line, where `optim_args` says `update_proj_gap`: GaLore and the official code mean different things by it."""
    if "update_proj_gap" not in (text or ""):
        return
    if options.get("rank") is not None:
        logger.warning(
            "update_proj_gap=%s beside rank is GaLore's interval between new directions; "
            "the interval between momentum resets is reset_interval",
            options["update_proj_gap"],
        )
    else:
        logger.warning(
            "update_proj_gap=%s without rank is the official code's name for reset_interval, "
            "the interval between momentum resets",
            options["reset_interval"],
        )


def _decaying_names(model: "nn.Module") -> set[str]:
    from transformers import Trainer

    nobody: Any = None  # the method asks its Trainer nothing
    return set(Trainer.get_decay_parameter_names(nobody, model))
