"""What the Trainer knows of a step and tells no callback: the norm of the gradient before clipping, and the loss.

Callbacks run after `max_grad_norm` has clipped, and get no loss but the mean that is logged. Both pass through
accelerate: the norm is the return value of `Accelerator.clip_grad_norm_`, and the loss of each micro-batch, scaled as
it is trained on, is the argument of `Accelerator.backward`. `watch` wraps these two methods, and leaves what they saw
on the accelerator's optimizers, where callbacks find it.

For optimizers that are watched, and for ours, `clip_grad_norm_` also stops doing one thing: torch multiplies every
gradient by `max_norm / norm`, which is `nan` or 0 for all tensors as soon as one entry of one of them is not finite
(with `max_grad_norm=0`, too: the Trainer then measures the norm by clipping at infinity). See `clipping.py`.

Importing this package changes nothing in accelerate: `watch` is called when one of our callbacks is made, or a run of
one of our optimizers begins.
"""

from typing import Any

import torch
from accelerate import Accelerator
from transformers import Trainer

from hf_stablespam.trainer.callbacks.helpers.clipping import can_clip, clip, clip_over_meshes, coefficient
from hf_stablespam.trainer.callbacks.helpers.unwrapping import unwrap
from hf_stablespam.trainer.patching import patch

_NORM = "_hf_stablespam_norm"
_COEFFICIENT = "_hf_stablespam_coefficient"
_LOSS = "_hf_stablespam_loss"


def watch() -> None:
    """Wrap `Accelerator.clip_grad_norm_`, `Accelerator.backward`, and the Trainer's own clipping. Twice is harmless."""
    patch(Accelerator, "clip_grad_norm_", _keeping_norm)
    patch(Accelerator, "backward", _keeping_loss)
    if hasattr(Trainer, "_mixed_mesh_grad_norm"):  # from transformers 5.2x on
        patch(Trainer, "_mixed_mesh_grad_norm", _keeping_norm_over_meshes)


def watch_ours(optimizer: Any) -> None:
    """`watch`, where the optimizer of a run is one of ours, or stabilised: it passes over single gradients."""
    if _passes_over(optimizer):
        watch()


def forget(optimizer: Any) -> None:
    """Drop what was seen of the last step: a new one begins.

    Args:
        optimizer: the optimizer as callbacks get it, in accelerate's wrapper.
    """
    for name in (_NORM, _COEFFICIENT, _LOSS):
        setattr(optimizer, name, None)


def unclipped_norm(optimizer: Any) -> torch.Tensor | float | None:
    """The norm that this step's clipping measured, `None` where there was no clipping."""
    norm: Any = getattr(optimizer, _NORM, None)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def clipping_coefficient(optimizer: Any) -> torch.Tensor | float | None:
    """What this step's clipping multiplied the gradients by (at most 1), `None` where there was no clipping."""
    found: Any = getattr(optimizer, _COEFFICIENT, None)
    return found.full_tensor() if hasattr(found, "full_tensor") else found


def step_loss(optimizer: Any) -> torch.Tensor | None:
    """The loss of this step on this process so far, a sum over its micro-batches (0-dim, on its device)."""
    return getattr(optimizer, _LOSS, None)


def _keeping_norm(original: Any) -> Any:
    def clip_grad_norm_(self: Any, parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
        parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        concerned = any(hasattr(optimizer, _NORM) or _passes_over(optimizer) for optimizer in self._optimizers)
        if concerned and norm_type == 2 and can_clip(self, parameters):
            self.unscale_gradients()
            norm, factor = clip(parameters, max_norm)
        else:
            norm = original(self, parameters, max_norm, norm_type=norm_type)
            factor = None if norm is None else coefficient(norm, max_norm)
        for optimizer in self._optimizers:
            setattr(optimizer, _NORM, norm)
            setattr(optimizer, _COEFFICIENT, factor)
        return norm

    return clip_grad_norm_


def _keeping_norm_over_meshes(original: Any) -> Any:
    # With gradients on several device meshes the Trainer clips by itself, past accelerate.
    def _mixed_mesh_grad_norm(self: Any, model: Any, max_norm: float) -> Any:
        optimizers = self.accelerator._optimizers
        if any(hasattr(optimizer, _NORM) or _passes_over(optimizer) for optimizer in optimizers):
            norm, factor = clip_over_meshes(list(model.parameters()), max_norm)
        else:
            norm = original(self, model, max_norm)
            factor = coefficient(norm, max_norm)
        for optimizer in optimizers:
            setattr(optimizer, _NORM, norm)
            setattr(optimizer, _COEFFICIENT, factor)
        return norm

    return _mixed_mesh_grad_norm


def _passes_over(optimizer: Any) -> bool:
    """Whether a gradient that is not finite costs this optimizer one tensor's update and no more."""
    inner = unwrap(optimizer)
    return hasattr(inner, "stabilizer") or hasattr(inner, "statistics")


def _keeping_loss(original: Any) -> Any:
    def backward(self: Any, loss: Any, *args: Any, **kwargs: Any) -> Any:
        for optimizer in self._optimizers:
            before = getattr(optimizer, _LOSS, None)
            part = loss.detach() / self.gradient_accumulation_steps  # which is 1 in the Trainer
            setattr(optimizer, _LOSS, part if before is None else before + part)
        return original(self, loss, *args, **kwargs)

    return backward
