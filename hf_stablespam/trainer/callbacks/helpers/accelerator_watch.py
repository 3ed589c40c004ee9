"""What the Trainer knows of a step and tells no callback: the norm of the gradient before clipping, and the loss.

Callbacks run after `max_grad_norm` has clipped, and get no loss but the mean that is logged. Both pass through
accelerate: the norm is the return value of `Accelerator.clip_grad_norm_`, correct there for sharded gradients too, and
the loss of each micro-batch, scaled as it is trained on, is the argument of `Accelerator.backward`. `watch` wraps these
two methods, which do what they did, and leave what they saw on the accelerator's optimizers, where callbacks find it.
Only callbacks that need it call `watch`, when they are made: importing this package changes nothing in accelerate.
"""

from typing import Any

import torch
from accelerate import Accelerator

from hf_stablespam.trainer.patching import patch

_NORM = "_hf_stablespam_norm"
_LOSS = "_hf_stablespam_loss"


def watch() -> None:
    """Wrap `Accelerator.clip_grad_norm_` and `Accelerator.backward`. Twice is harmless."""
    patch(Accelerator, "clip_grad_norm_", _keeping_norm)
    patch(Accelerator, "backward", _keeping_loss)


def forget(optimizer: Any) -> None:
    """Drop what was seen of the last step: a new one begins.

    Args:
        optimizer: the optimizer as callbacks get it, in accelerate's wrapper.
    """
    setattr(optimizer, _NORM, None)
    setattr(optimizer, _LOSS, None)


def unclipped_norm(optimizer: Any) -> torch.Tensor | float | None:
    """The norm that this step's clipping measured, `None` where there was no clipping."""
    norm: Any = getattr(optimizer, _NORM, None)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def step_loss(optimizer: Any) -> torch.Tensor | None:
    """The loss of this step on this process so far, a sum over its micro-batches (0-dim, on its device)."""
    return getattr(optimizer, _LOSS, None)


def _keeping_norm(original: Any) -> Any:
    def clip_grad_norm_(self: Any, *args: Any, **kwargs: Any) -> Any:
        norm = original(self, *args, **kwargs)
        for optimizer in self._optimizers:
            setattr(optimizer, _NORM, norm)
        return norm

    return clip_grad_norm_


def _keeping_loss(original: Any) -> Any:
    def backward(self: Any, loss: Any, *args: Any, **kwargs: Any) -> Any:
        for optimizer in self._optimizers:
            before = getattr(optimizer, _LOSS, None)
            part = loss.detach() / self.gradient_accumulation_steps  # which is 1 in the Trainer
            setattr(optimizer, _LOSS, part if before is None else before + part)
        return original(self, loss, *args, **kwargs)

    return backward
