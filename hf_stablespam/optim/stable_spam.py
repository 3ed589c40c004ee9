"""The Stable-SPAM optimizer: options, state, dispatch. The mathematics is in `formulas` and its neighbours."""

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from hf_stablespam.optim.options import check_group_names, check_stable_spam
from hf_stablespam.optim.plain_adamw import is_plain_adamw, plain_adamw_step
from hf_stablespam.optim.single_tensor import stabilized, stable_spam_step

STATISTICS = (
    "grad_norm",
    "grad_max",
    "clip_threshold",
    "clipped",
    "norm_factor",
    "stable_norm",
    "nonfinite",
    "reset",
)
_COUNTERS = ("step", "moment_step")
_TRACKERS = ("clip_max", "norm_mean", "norm_sq")
_MOMENTS = ("exp_avg", "exp_avg_sq")


class StableSPAM(Optimizer):
    r"""Adam with clipped spikes, normalised gradients and reset momentum: Stable-SPAM (arXiv 2502.17055).

    For each parameter tensor ``w`` with gradient ``g`` at its step ``t``:

    .. code-block:: text

        AdaClip  T ← γ3·T + (1−γ3)·max|g|     T̂ = T/(1−γ3ᵗ)       g_i ← g_i/max|g|·T̂  where |g_i| > T̂
        AdaGN    m ← sγ1·m + (1−sγ1)·‖g‖      v ← γ2·v + (1−γ2)·‖g‖²
                 g ← g/‖g‖ · m̂/(√v̂+ε)         m̂ = m/(1−(sγ1)ᵗ)    v̂ = v/(1−γ2ᵗ)
        MoRet    every ΔT steps: M ← 0, V ← 0, k ← 0, before the gradient enters them
        AdamW    M ← sβ1·M + (1−sβ1)·g        V ← β2·V + (1−β2)·g²     k ← k+1
                 w ← w·(1−lr·wd) − lr·(M/(1−(sβ1)ᵏ)) / (√(V/(1−β2ᵏ)) + ε)

    ``t`` counts the finite gradients that the tensor has had and is never reset; ``k`` counts those since the
    moments were last reset. A gradient with ``nan`` or ``inf`` (or whose squared norm leaves the range of float32)
    leaves weight, moments, trackers and counters of its tensor as they were. ``p.grad`` is not changed.

    With ``clip_beta=None, norm_betas=None, reset_interval=None`` this is `torch.optim.AdamW`.

    Args:
        params: parameters, named parameters, or parameter groups with options of their own.
        lr: learning rate, ≥ 0; a number or a tensor of one element. Default 1e-3.
        betas: ``(β1, β2)``, decay rates of Adam's moments, each in [0, 1). Default (0.9, 0.999).
        eps: ``ε`` in the denominators of Adam and of AdaGN, ≥ 0. Default 1e-8.
        weight_decay: decoupled weight decay ``wd``, per unit of learning rate, ≥ 0. Default 0.0.
        clip_beta: ``γ3``, decay rate of the running largest entry, in [0, 1). Default 0.999. ``None``: no clipping.
        norm_betas: ``(γ1, γ2)``, decay rates of the running norm and squared norm. Default (0.7, 0.9), the paper's
            for 4-bit training (for bfloat16 the paper has (0.85, 0.99999)). ``None``: no normalising.
        reset_interval: ``ΔT``, steps between resets of the moments. Default 1000. ``None``: no resets.
        decay_steps: ``D``, steps over which ``s`` falls from 1 to ``decay_floor`` by a cosine and stays there
            (``total_T`` in the official code, the run's number of update steps there and in the Trainer).
            Default ``None``: ``s = 1``. ``"auto"`` is for the Trainer, which puts the number in.
        decay_floor: the last value of ``s``, in [0, 1]. Default 0.5, the official code's.
        maximize: climb instead of descend. Default ``False``.
        foreach: force (``True``) or forbid (``False``) the multi-tensor path. Default ``None``: choose.
        fused: force or forbid the fused path. Default ``None``: choose.

    Raises:
        ValueError: for an option out of its range, a complex parameter, a sparse gradient.
        TypeError: for a misspelt option in a parameter group.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = StableSPAM(model.parameters(), lr=1e-3, reset_interval=500)
        >>> model(torch.ones(3, 4)).square().sum().backward()
        >>> optimizer.step()
        >>> optimizer.statistics["clipped"]
        tensor([0., 0.])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        clip_beta: float | None = 0.999,
        norm_betas: tuple[float, float] | None = (0.7, 0.9),
        reset_interval: int | None = 1000,
        decay_steps: int | str | None = None,
        decay_floor: float = 0.5,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "clip_beta": clip_beta,
            "norm_betas": norm_betas,
            "reset_interval": reset_interval,
            "decay_steps": decay_steps,
            "decay_floor": decay_floor,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
        }
        check_stable_spam(defaults)
        self._last_step: dict[Tensor, dict[str, Tensor]] = {}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own; what a group does not name it takes from the constructor.

        Raises:
            ValueError: for an option out of its range or a complex parameter.
            TypeError: for a misspelt option.
        """
        if isinstance(param_group, dict):
            check_group_names(param_group, self.defaults)
            check_stable_spam({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for index, param in enumerate(self.param_groups[-1]["params"]):
            if param.is_complex():
                self.param_groups.pop()
                raise ValueError(
                    f"parameters must be real, got {param.dtype} for parameter {index} of the group; "
                    "optimize torch.view_as_real(parameter) instead"
                )

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Perform one step of optimization.

        Args:
            closure: re-evaluates the model and returns the loss, if the loss is to be returned.

        Raises:
            ValueError: for a sparse gradient, and for ``decay_steps="auto"`` outside the Trainer.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [(group, self._params_with_grad(group)) for group in self.param_groups]
        self._last_step = {}
        for group, params in groups:
            if is_plain_adamw(group) and not torch.compiler.is_compiling() and all(p.is_cpu for p in params):
                self._plain_adamw_step(group, params)
            else:
                for param in params:
                    self._last_step[param] = stable_spam_step(param, _grad(param), self.state[param], group)
        return loss

    @torch.no_grad()
    def reset_moments(self) -> None:
        """Set Adam's moments ``M`` and ``V`` and their step count ``k`` to zero; the trackers stay.

        Call it between steps: the next gradient enters the fresh moments. `MomentumResetCallback` does.

        Example:
            >>> weight = torch.nn.Parameter(torch.ones(2))
            >>> optimizer = StableSPAM([weight], reset_interval=None)
            >>> weight.grad = torch.ones(2)
            >>> optimizer.step()
            >>> optimizer.reset_moments()
            >>> optimizer.state[weight]["exp_avg"]
            tensor([0., 0.])
        """
        for state in self.state.values():
            for name in ("exp_avg", "exp_avg_sq", "moment_step"):
                if name in state:
                    state[name].zero_()

    @property
    def statistics(self) -> dict[str, Tensor]:
        """What the last step saw: for each name a float vector with one entry per parameter, on their device.

        Entries follow the parameters of `param_groups`; a parameter without gradient has zeros. Empty before the
        first step.

        * ``grad_norm``, ``grad_max``: ``‖g‖₂`` and ``max|g|`` as the gradient came;
        * ``clip_threshold``, ``clipped``: ``T̂``, and how many entries were above it;
        * ``norm_factor``: AdaGN's ``c/n``; ``stable_norm``: the norm of the gradient that entered the moments;
        * ``nonfinite``: 1 where the gradient was not finite, so that the tensor was passed over;
        * ``reset``: 1 where ``reset_interval`` reset the moments in this step.
        """
        if not self._last_step:
            return {}
        params = list(chain.from_iterable(group["params"] for group in self.param_groups))
        example = next(iter(self._last_step.values()))["grad_norm"]
        rows = [self._last_step.get(param) for param in params]
        zero = torch.zeros_like(example)
        return {name: torch.stack([zero if row is None else row[name].to(zero) for row in rows]) for name in STATISTICS}

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state saved by `state_dict`, with every tensor in the dtype in which it was saved.

        As with every torch optimizer the saved `param_groups` replace the options given to the constructor.

        Args:
            state_dict: what `state_dict` returned.

        Raises:
            ValueError: if a parameter's state lacks what the next step needs.
        """
        _check_states(state_dict["state"])
        super().load_state_dict(state_dict)
        saved_ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for saved_id, param in zip(saved_ids, params, strict=True):
            if saved_id in state_dict["state"]:
                fresh, saved = self._fresh_state(param), state_dict["state"][saved_id]
                self.state[param] = {name: fresh[name].copy_(saved[name]) for name in fresh}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._last_step = {}
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)

    def _params_with_grad(self, group: dict[str, Any]) -> list[Tensor]:
        """Parameters that this step updates, with their state; nothing is changed before all are checked."""
        if group["decay_steps"] == "auto":
            raise ValueError(
                "decay_steps must be a number of update steps or None when step() is called, got 'auto'; "
                "the Trainer puts the run's number in, elsewhere pass it yourself"
            )
        params = [param for param in group["params"] if param.grad is not None and param.numel() > 0]
        for param in params:
            if (layout := _grad(param).layout) != torch.strided:
                raise ValueError(
                    f"gradients must be dense, got {layout} for a parameter of shape {tuple(param.shape)}; "
                    "build the embedding with sparse=False"
                )
        for param in params:
            if not self.state[param]:
                self.state[param] = self._fresh_state(param)
        return params

    @staticmethod
    def _fresh_state(param: Tensor) -> dict[str, Tensor]:
        """Counters in float32 as torch keeps them, trackers in float32 or better, moments like the parameter."""
        precise = torch.promote_types(param.dtype, torch.float32)
        state = {name: torch.zeros((), dtype=torch.float32, device=param.device) for name in _COUNTERS}
        state |= {name: torch.zeros((), dtype=precise, device=param.device) for name in _TRACKERS}
        state |= {name: torch.zeros_like(param, memory_format=torch.preserve_format) for name in _MOMENTS}
        return state

    def _plain_adamw_step(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for param in params:
            self._last_step[param] = stabilized(_grad(param), self.state[param], group)[-1]
        finite = [param for param in params if not self._last_step[param]["nonfinite"]]
        plain_adamw_step(finite, [_grad(p) for p in finite], [self.state[p] for p in finite], group)


def _grad(param: Tensor) -> Tensor:
    assert param.grad is not None, "called for parameters that have a gradient"
    return param.grad


def _check_states(states: dict[Any, dict[str, Any]]) -> None:
    needed = (*_COUNTERS, *_TRACKERS, *_MOMENTS)
    for index, state in states.items():
        missing: Iterable[str] = [name for name in needed if name not in state]
        if missing:
            raise ValueError(
                f"the state of parameter {index} must hold {', '.join(needed)}, but lacks {', '.join(missing)}; "
                "it was saved by another optimizer, so begin a new run from the weights alone"
            )
