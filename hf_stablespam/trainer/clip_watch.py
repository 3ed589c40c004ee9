"""The norm of the gradient before the Trainer's own clipping.

Callbacks run after `max_grad_norm` has clipped. The norm from before is known in one place only, the return value of
`Accelerator.clip_grad_norm_`, and correct there for sharded gradients too: it is kept here until the next step.
"""

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_MARK = "_hf_stablespam"
_last: "dict[str, torch.Tensor | float | None]" = {"norm": None}


def watch(accelerator_cls: Any) -> None:
    """Make `Accelerator.clip_grad_norm_` leave its result here as well. Twice is harmless."""
    original = accelerator_cls.clip_grad_norm_
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def clip_grad_norm_(self: Any, *args: Any, **kwargs: Any) -> Any:
        _last["norm"] = norm = original(self, *args, **kwargs)
        return norm

    setattr(clip_grad_norm_, _MARK, True)
    accelerator_cls.clip_grad_norm_ = clip_grad_norm_


def forget() -> None:
    """Drop the last norm: a new update step begins."""
    _last["norm"] = None


def unclipped_norm() -> "torch.Tensor | float | None":
    """The norm that this step's clipping measured, `None` where the Trainer did not clip."""
    return _last["norm"]
