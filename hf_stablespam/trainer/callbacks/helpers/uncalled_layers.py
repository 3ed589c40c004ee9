"""4-bit layers that the model never calls: their weights are trained, and multiplied by, in high precision."""

from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from hf_stablespam.quant.layers.linear import trained_uncalled


def refuse_uncalled_layers(model: nn.Module, args: TrainingArguments) -> None:
    """Stop before the first update where a 4-bit layer has a gradient and was never called. All processes call it.

    Raises:
        ValueError: with the layers' names.
    """
    if args.torch_compile or any(map(_is_compiled, model.modules())):
        return  # what is called there leaves no trace
    uncalled = trained_uncalled(model)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        found: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(found, uncalled)  # another process may have called it
        uncalled = [name for name in uncalled if all(name in names for names in found)]
    if uncalled:
        more = f" and {len(uncalled) - 6} more" if len(uncalled) > 6 else ""
        raise ValueError(
            f"the weights of {', '.join(uncalled[:6])}{more} have gradients, but these 4-bit layers were never called:"
            " the model multiplies by the weights itself, so that nothing of that is in 4 bits; name the layers in"
            " modules_to_not_convert, or switch off what reads their weights (a fused loss, a kernel)"
        )


def _is_compiled(module: nn.Module) -> bool:
    forward = getattr(type(module), "forward", None)
    compiled_call = getattr(module, "_compiled_call_impl", None) is not None
    return compiled_call or hasattr(module, "_orig_mod") or hasattr(forward, "_torchdynamo_orig_callable")
