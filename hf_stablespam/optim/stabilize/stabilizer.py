"""AdaClip and AdaGN in front of any torch optimizer, through the hooks that every optimizer has."""

import sys
from functools import wraps
from itertools import chain
from traceback import walk_stack
from types import FrameType, MethodType
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from hf_stablespam.optim.base import STABILIZER, ordered
from hf_stablespam.optim.options import STABLE_SPAM, check_gradient, check_options
from hf_stablespam.optim.plan import Batch, Result, State
from hf_stablespam.optim.state.fresh import fresh_trackers
from hf_stablespam.optim.step import rescale

_TRACKERS = ("step", "clip_max", "norm_mean", "norm_sq")  # what is saved; the others say nothing without moments


def stabilize(
    optimizer: Optimizer,
    *,
    clip_beta: float | None = 0.999,
    norm_betas: tuple[float, float] | None = (0.7, 0.9),
    eps: float = 1e-8,
) -> Optimizer:
    r"""Clip the spikes and normalise the gradients of any torch optimizer, as `StableSPAM` does in front of Adam.

    Before each `step`, for each parameter tensor with gradient ``g`` at its step ``t``:

    .. code-block:: text

        AdaClip  T ← γ3·T + (1−γ3)·max|g|     T̂ = T/(1−γ3ᵗ)       g_i ← g_i/max|g|·T̂  where |g_i| > T̂
        AdaGN    m ← γ1·m + (1−γ1)·‖g‖        v ← γ2·v + (1−γ2)·‖g‖²
                 g ← g/‖g‖ · m̂/(√v̂+ε)         m̂ = m/(1−γ1ᵗ)       v̂ = v/(1−γ2ᵗ)

    The optimizer sees the new gradients; after the step, or if it raises, ``p.grad`` is again the tensor that it was,
    unchanged. The new ones take the memory of one more set of gradients: during the step, and on the CPU from the first
    step on, where new memory would cost more each time than all the rest. ``T``, ``m``, ``v`` and ``t`` are saved and
    loaded with the optimizer's own `state_dict`, under ``stabilizer_…`` in the state of each parameter; `stabilize` may
    come before or after `load_state_dict`. A pickled or deep-copied optimizer loses its hooks: stabilise the copy.

    A gradient with ``nan`` or ``inf`` never enters the trackers. On the CPU the optimizer passes that tensor over
    for the step; on an accelerator, where asking would wait for the device, it sees zeros instead.

    ``optimizer.stabilizer.statistics`` is what `StableSPAM.statistics` is; ``optimizer.stabilizer.remove()`` takes
    everything away again. With `torch.optim.AdamW` this is `StableSPAM` without resets and decay.

    Args:
        optimizer: any `torch.optim.Optimizer` (SGD, AdamW, Muon, Adafactor, Lion, 8-bit Adam …) that evaluates its
            closure at most once per step. One that accelerate has wrapped is stabilised inside the wrapper, where
            the attribute ``stabilizer`` then is.
        clip_beta: ``γ3``, default 0.999, as for `StableSPAM`, and so are ``norm_betas`` (``(γ1, γ2)``, default
            (0.7, 0.9)) and ``eps`` (``ε`` of AdaGN, default 1e-8). ``None`` switches clipping or normalising off.

    Returns:
        The same optimizer.

    Raises:
        TypeError: if it is not a torch optimizer, or one that this cannot be done to.
        ValueError: for an option out of its range, or an optimizer that is stabilised already. At a step: for a
            sparse gradient or a sharded parameter.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = stabilize(torch.optim.SGD(model.parameters(), lr=0.1))
        >>> model(torch.ones(3, 4)).square().sum().backward()
        >>> optimizer.step()
        >>> optimizer.stabilizer.statistics["clipped"]
        tensor([0., 0.])
    """
    options = check_stabilize_options(clip_beta, norm_betas, eps)
    inner = _innermost(optimizer)
    _check_optimizer(inner)
    inner.stabilizer = Stabilizer(inner, options)
    return optimizer


class Stabilizer:
    """What `stabilize` puts in front of an optimizer: hooks, trackers, and the way to remove them."""

    def __init__(self, optimizer: Optimizer, options: dict[str, Any]) -> None:
        self._optimizer, self._options = optimizer, options
        self._trackers: dict[Tensor, State] = {}
        self._last_step: list[Result] = []
        self._found: dict[Tensor, Tensor | None] = {}  # the gradients as they came, while the optimizer steps
        self._stepping: FrameType | None = None  # who called our hook before that step
        self._step: Any = self._restoring(optimizer.step)
        optimizer.step = self._step  # type: ignore[method-assign]
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_state_dict_post_hook(self._save),
            optimizer.register_load_state_dict_pre_hook(self._forget),
        ]
        # A GradScaler hands its scale to a fused optimizer, after our hook; told no, it unscales before.
        self._scales_itself = getattr(optimizer, "_step_supports_amp_scaling", None)
        if self._scales_itself:
            optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]

    def remove(self) -> None:
        """Take the hooks and the trackers away: the optimizer is what it was before `stabilize`.

        Example:
            >>> optimizer = stabilize(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1))
            >>> optimizer.stabilizer.remove()
            >>> hasattr(optimizer, "stabilizer")
            False
        """
        for hook in self._hooks:
            hook.remove()
        if vars(self._optimizer).get("step") == self._step:  # else a wrapper that came later holds it
            self._optimizer.step = self._step.__wrapped__  # type: ignore[method-assign]
        if self._scales_itself:
            self._optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]
        del self._optimizer.stabilizer  # type: ignore[attr-defined]

    @property
    def statistics(self) -> dict[str, Tensor]:
        """What the last step saw, as `StableSPAM.statistics` has it; empty before the first step."""
        return ordered(self._last_step, self._params())

    def trackers(self) -> dict[Tensor, State]:
        """Those of each parameter, loaded ones among them; who puts another parameter in its place moves them."""
        self._adopt_loaded()
        return self._trackers

    def _params(self) -> list[Tensor]:
        return list(chain.from_iterable(group["params"] for group in self._optimizer.param_groups))

    def _restoring(self, step: Any) -> Any:
        """A step that gives the gradients back if it raises, when torch calls no hook."""

        @wraps(step)
        def restoring(_: Optimizer, *args: Any, **kwargs: Any) -> Any:
            try:
                return step(*args, **kwargs)
            finally:
                self._restore_gradients()

        return MethodType(restoring, self._optimizer)  # learning rate schedulers want a method

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _is_running(self._stepping):  # torch puts hooks into classes: a step that calls its parent's comes by twice
            return None
        self._restore_gradients()
        self._stepping = sys._getframe(1)
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            self._replace_gradients()
            return None

        def stabilized_closure() -> Any:  # the gradients come into being inside the step
            loss = closure()
            self._replace_gradients()
            return loss

        return args[:1] + args[2:], {**kwargs, "closure": stabilized_closure}

    @torch.no_grad()
    def _replace_gradients(self) -> None:
        self._adopt_loaded()
        self._last_step, params = [], self._params()
        for param in params:
            check_gradient(param, "stabilize")
        batch = Batch.of(params, self._trackers, fresh_trackers)
        for result, grads in rescale([(batch, self._options)] if batch.params else []):
            self._last_step.append(result)
            bad = result.statistics["nonfinite"].unbind()
            for param, grad, is_bad in zip(result.params, grads, bad, strict=True):
                self._found[param], param.grad = param.grad, None if grad.is_cpu and is_bad else grad

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if sys._getframe(1) is self._stepping:
            self._restore_gradients()

    def _restore_gradients(self) -> None:
        for param, grad in self._found.items():
            param.grad = grad
        self._found, self._stepping = {}, None

    def _save(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Add the trackers, as numbers: loading casts tensors to the parameter's dtype, which may be coarser."""
        self._adopt_loaded()
        states = dict(state_dict["state"])
        saved_ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for saved_id, param in zip(saved_ids, self._params(), strict=True):
            if param in self._trackers:
                values = torch.stack([self._trackers[param][name].double() for name in _TRACKERS]).tolist()
                named = {STABILIZER + name: value for name, value in zip(_TRACKERS, values, strict=True)}
                states[saved_id] = {**states.get(saved_id, {}), **named}
        return {**state_dict, "state": states}

    def _forget(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        self._trackers = {}

    def _adopt_loaded(self) -> None:
        """Move trackers from the optimizer's state, where `load_state_dict` of whatever optimizer left them, to here.

        There they must not stay: optimizers take a parameter with any state for one that they have stepped before.
        """
        for param in self._params():
            state = self._optimizer.state.get(param, {})
            saved = {name: state.pop(STABILIZER + name) for name in _TRACKERS if STABILIZER + name in state}
            if len(saved) == len(_TRACKERS):
                fresh = fresh_trackers(param)
                for name, value in saved.items():
                    fresh[name].fill_(value)
                self._trackers[param] = fresh


def check_stabilize_options(clip_beta: Any, norm_betas: Any, eps: Any) -> dict[str, Any]:
    """The options that AdaClip and AdaGN read, from those of `stabilize`; a ValueError for one out of its range."""
    given = {"clip_beta": clip_beta, "norm_betas": norm_betas, "eps": eps}
    check_options({name: STABLE_SPAM[name] for name in given}, given)
    off = {"reset_interval": None, "decay_steps": None, "weight_decay": 0.0, "lr": 0.0}
    return {name: option.default for name, option in STABLE_SPAM.items()} | off | given


def _is_running(frame: FrameType | None) -> bool:
    """Whether a function has not returned yet that called, through however many others, this one."""
    return frame is not None and any(caller is frame for caller, _ in walk_stack(sys._getframe()))


def _innermost(optimizer: Any) -> Any:
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _check_optimizer(optimizer: Any) -> None:
    name = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {name}; stabilize works through its hooks")
    if isinstance(getattr(optimizer, "stabilizer", None), Stabilizer):
        raise ValueError(
            f"optimizer must not be stabilised twice, got {name}; call optimizer.stabilizer.remove() first"
        )
    if all("norm_betas" in group and "clip_beta" in group for group in optimizer.param_groups):
        raise TypeError(f"optimizer must not clip and normalise by itself, got {name}; use it as it is")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError(f"optimizer must evaluate its closure once per step, got {name}; use a first-order optimizer")
    if hasattr(optimizer, "optimizer_dict"):
        raise TypeError(
            f"optimizer must step by itself, got {name}, whose updates happen inside the backward pass; "
            "stabilise each optimizer in its optimizer_dict"
        )
