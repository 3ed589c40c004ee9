"""Stable-SPAM inside the backward pass: a parameter is updated, and its gradient freed, once it is complete."""

from collections.abc import Iterable
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from hf_stablespam.optim.options import check_gradient
from hf_stablespam.optim.plan import Result
from hf_stablespam.optim.stable_spam import StableSPAM, check_before_step, update

_HOOKS = WeakTensorKeyDictionary()  # of each parameter, the one that updates it


class LayerwiseStableSPAM(StableSPAM):
    """`StableSPAM` whose updates happen during `backward()`, so that only one gradient is alive at a time.

    Every parameter gets a hook that updates it when its gradient has been accumulated, and then frees the gradient.
    `step` only closes the step (statistics, schedulers). Weights and states are those of `StableSPAM` on the same
    gradients, and so are checkpoints, in both directions. What needs all gradients at once has no place here: gradient
    accumulation, clipping by the global norm, gradient scaling (float16), and processes that share gradients (DDP) or
    parameters (FSDP).

    A parameter belongs to the last optimizer of this class that was made for it. Before one of another kind takes over,
    delete this one, or call `hf_stablespam.optim.layerwise.remove_hooks(params)`, as the Trainer does at its end.

    Args:
        params: as for `StableSPAM`, and so are all other arguments.

    Raises:
        ValueError: at a step, if a gradient is there that no hook has seen; in `backward()`, for a sharded parameter.

    Example:
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = LayerwiseStableSPAM(model.parameters(), lr=1e-3)
        >>> model(torch.ones(3, 8)).square().sum().backward()
        >>> model.weight.grad is None, optimizer.state[model.weight]["step"]
        (True, tensor(1.))
        >>> optimizer.step()
    """

    _updated: list[Result]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own, as `StableSPAM` does, and hook them."""
        self._updated = getattr(self, "_updated", [])
        super().add_param_group(param_group)
        self._hook(self.param_groups[-1]["params"])

    def hook_parameters(self) -> None:
        """Update the parameters of all groups during `backward()` again, after `remove_hooks`."""
        for group in self.param_groups:
            self._hook(group["params"])

    def _hook(self, params: list[Tensor]) -> None:
        remove_hooks(params)
        update = WeakMethod(self._update_one)  # so that the hook goes when the optimizer does
        for param in (param for param in params if param.requires_grad):
            _HOOKS[param] = param.register_post_accumulate_grad_hook(lambda one: (update() or _leave)(one))

    def _update(self) -> list[Result]:
        """Close the step; the updates were made during `backward()`."""
        for param in (param for group in self.param_groups for param in group["params"]):
            if param.grad is not None:
                raise ValueError(
                    f"gradients must come from backward(), got one set otherwise for a parameter of shape "
                    f"{tuple(param.shape)} (replaced after the optimizer was made, as FSDP does?); use StableSPAM"
                )
        seen, self._updated = self._updated, []
        return seen

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._updated = []

    @torch.no_grad()
    def _update_one(self, param: Tensor) -> None:
        group = next(group for group in self.param_groups if any(other is param for other in group["params"]))
        check_before_step(group)
        check_gradient(param, "LayerwiseStableSPAM")
        self._updated += update([(self._batch([param], group), group)])
        param.grad = None


def remove_hooks(params: Iterable[Tensor]) -> None:
    """Let `backward()` accumulate the gradients of these parameters again, whichever optimizer had hooked them.

    Example:
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = LayerwiseStableSPAM(model.parameters())
        >>> remove_hooks(model.parameters())
        >>> model(torch.ones(3, 8)).sum().backward()
        >>> model.bias.grad
        tensor([3., 3., 3., 3.])
    """
    for param in params:
        if (hook := _HOOKS.pop(param, None)) is not None:
            hook.remove()


def _leave(_: Tensor) -> None:
    """Nothing is done to a parameter whose optimizer is gone."""
