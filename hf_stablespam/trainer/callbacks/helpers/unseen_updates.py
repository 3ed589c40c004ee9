"""Runs in which callbacks would come too late: the weights are updated inside the backward pass, unseen by them."""

from typing import Any

from transformers import TrainingArguments

from hf_stablespam.optim import LayerwiseStableSPAM
from hf_stablespam.trainer.callbacks.helpers.unwrapping import unwrap
from hf_stablespam.trainer.registration.flat_shards import runs_deepspeed
from hf_stablespam.trainer.registration.options.optim_args import parse_optim_args

_IN_BACKWARD = ("lomo", "adalomo")


def refuse_unseen_updates(callback: Any, args: TrainingArguments, optimizer: Any = None) -> None:
    """Stop a run in which the gradients are gone, and the weights updated, when callbacks are called.

    Args:
        callback: what looks at gradients, or changes the optimizer between backward pass and step.
        args: of the run.
        optimizer: of the run, where it is made.

    Raises:
        ValueError: for layer-wise optimizers, LOMO, and DeepSpeed, whose engine steps inside `backward`.
    """
    name = str(getattr(args.optim, "value", args.optim))
    inner = unwrap(optimizer)
    layerwise = name == "stable_spam" and parse_optim_args(args.optim_args).get("layerwise", False)
    if layerwise or isinstance(inner, LayerwiseStableSPAM):
        found, remedy = "layerwise=true", "leave layerwise out"
    elif name.endswith("_layerwise") or name in _IN_BACKWARD or hasattr(inner, "optimizer_dict"):
        found, remedy = f"optim={name}", "use another optimizer"
    elif runs_deepspeed(args):
        found, remedy = "DeepSpeed", "use FSDP2 or DDP"
    else:
        return
    raise ValueError(
        f"{type(callback).__name__} must see the gradients before the weights are updated, and with {found} they are "
        f"updated inside the backward pass; {remedy}, or remove the callback"
    )
