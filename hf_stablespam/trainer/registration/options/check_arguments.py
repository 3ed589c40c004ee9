"""`optim_args` and the fields beside it are checked when `TrainingArguments` are made, before anything is loaded."""

from typing import TYPE_CHECKING, Any

from hf_stablespam.trainer.registration.options.galore_groups import (
    PROJECTION_OPTIONS,
    check_layerwise,
    check_rank_and_targets,
)
from hf_stablespam.trainer.registration.options.lr_scales import check_scale, take_scales
from hf_stablespam.trainer.registration.options.optim_args import SPAM, STABLE_SPAM, parse_optim_args

if TYPE_CHECKING:
    from transformers import TrainingArguments

# An option → the one that switches it off when it is None.
_MASTERS = {
    "stable_spam": {"decay_floor": "decay_steps", **{name: "rank" for name in PROJECTION_OPTIONS if name != "rank"}},
    "spam": {"clip_delay": "threshold", "warmup_steps": "reset_interval"},
}


def check_arguments(args: "TrainingArguments") -> None:
    """Read all options of `optim="stable_spam"` and `"spam"`, and try them on a parameter of nobody's.

    Raises:
        ValueError: an option that is unknown, cannot be read, is out of its range, or would count for nothing.
    """
    name = str(getattr(args.optim, "value", args.optim))
    if name not in _MASTERS:
        return
    import torch

    from hf_stablespam.optim import SPAM as Spam
    from hf_stablespam.optim import StableSPAM

    options = parse_optim_args(args.optim_args, STABLE_SPAM if name == "stable_spam" else SPAM)
    if name == "stable_spam":
        check_rank_and_targets(args, options.get("rank"))
    elif args.optim_target_modules is not None:
        raise ValueError(
            f"optim_target_modules must be left out with optim=spam, which projects nothing, got "
            f"{args.optim_target_modules!r}; use optim=stable_spam with rank in optim_args"
        )
    _check_masters(name, options)
    if options.pop("layerwise", False):
        check_layerwise(args)
    for scale in take_scales(options).items():
        check_scale(*scale)
    fields = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    cls: Any = StableSPAM if name == "stable_spam" else Spam
    matrix = torch.empty(1 << 20, 1 << 20, device="meta")  # of no size that a rank could be too large for
    cls([matrix], **fields, weight_decay=args.weight_decay, **options)


def _check_masters(name: str, options: dict[str, Any]) -> None:
    for option, master in _MASTERS[name].items():
        off = master in options and options[master] is None
        if option in options and (off or (master == "rank" and "rank" not in options)):
            raise ValueError(
                f"optim_args sets {option}={options[option]}, which counts for nothing without {master}; "
                f"set {master}, or leave {option} out"
            )
