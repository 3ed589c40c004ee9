"""SPAM, which Stable-SPAM came from: Adam with clipped spikes and reset momentum, also sparse."""

from collections.abc import Callable
from itertools import chain
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from hf_stablespam.optim.options import check_group_names, check_real
from hf_stablespam.optim.spam_options import check_gradients, check_spam
from hf_stablespam.optim.spam_update import State, spam_step
from hf_stablespam.optim.sparse_mask import draw_mask, empty_mask, kept_entries

_MOMENTS = ("exp_avg", "exp_avg_sq")


class SPAM(Optimizer):
    r"""Spike-Aware Adam with Momentum Reset (arXiv 2501.06842).

    For each parameter tensor ``w`` with gradient ``g`` at its step ``t``:

    .. code-block:: text

        reset    every ΔT steps: M ← 0, V ← 0, k ← 0, before the gradient enters them
        clip     g_i ← sign(g_i)·√(θ·V_i)   where g_i² > θ·V_i, once more than `clip_delay` gradients are in V
        Adam     k ← k+1;  M ← β1·M + (1−β1)·g;  V ← β2·V + (1−β2)·g²
        update   w ← w·(1−lr·wd) − u·lr·(M/(1−β1ᵏ)) / (√(V/(1−β2ᵏ)) + ε)
        warm-up  u = 1 − 0.99·(1 + cos(π·(k−1)/N))/2  for the first N steps after a reset, otherwise 1

    ``V`` is the second moment as it stands before the step, not bias-corrected. An entry whose ``V`` is still zero
    has no history and is not clipped. With ``density`` below 1 only a random subset of the entries of each
    2-dimensional parameter is trained (and decayed): the moments hold those entries only, one bit per entry says
    which they are, and each reset draws a new subset. ``t`` counts the tensor's steps. A gradient with ``nan`` or
    ``inf`` leaves weight, moments and ``k`` of its tensor as they were. ``p.grad`` is not changed.

    Where the official code differs: its bias correction goes on counting after a reset, weight decay does nothing
    beside ``density``, and sparse groups overwrite ``p.grad``.

    Args:
        params: parameters, named parameters, or parameter groups with options of their own.
        lr: learning rate, ≥ 0; a number or a tensor of one element. Default 1e-3.
        betas: ``(β1, β2)``, decay rates of Adam's moments, each in [0, 1). Default (0.9, 0.999).
        eps: ``ε``, ≥ 0. Default 1e-6, the official code's.
        weight_decay: decoupled weight decay ``wd``, per unit of learning rate, ≥ 0. Default 0.0.
        threshold: ``θ``, how many times its second moment a squared entry may be, > 0. Default 5000, the
            paper's. ``None``: no clipping.
        clip_delay: gradients that must be in ``V`` before clipping begins, ≥ 0. Default 20, the official code's.
        reset_interval: ``ΔT``, steps between resets. Default 500, the paper's. ``None``: no resets.
        warmup_steps: ``N``, steps of the warm-up after each reset; 0 for none. Default 150, the paper's.
        density: share of the entries of 2-dimensional parameters that is trained between two resets, in (0, 1].
            Default 1.0: all.
        seed: of the random subsets. Default 0.
        maximize: climb instead of descend. Default ``False``.

    Raises:
        ValueError: for an option out of its range, a complex or sharded parameter, a sparse gradient.
        TypeError: for a misspelt option in a parameter group.

    Example:
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = SPAM(model.parameters(), lr=1e-3, density=0.25)
        >>> model(torch.ones(3, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[model.weight]["exp_avg"].shape
        torch.Size([8])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        threshold: float | None = 5000.0,
        clip_delay: int = 20,
        reset_interval: int | None = 500,
        warmup_steps: int = 150,
        density: float = 1.0,
        seed: int = 0,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "threshold": threshold,
            "clip_delay": clip_delay,
            "reset_interval": reset_interval,
            "warmup_steps": warmup_steps,
            "density": density,
            "seed": seed,
            "maximize": maximize,
        }
        check_spam(defaults)
        self._last_step: dict[Tensor, State] = {}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own; what a group does not name it takes from the constructor.

        Raises:
            ValueError: for an option out of its range, or a parameter that cannot be trained with these options.
            TypeError: for a misspelt option.
        """
        if isinstance(param_group, dict):
            check_group_names(param_group, self.defaults)
            check_spam({**self.defaults, **param_group})
        super().add_param_group(param_group)
        try:
            check_real(self.param_groups[-1]["params"])
        except ValueError:
            self.param_groups.pop()
            raise

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
            ValueError: for a sparse gradient or a sharded parameter.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            check_gradients(group)
        self._last_step = {}
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None and param.numel() > 0:
                    self._last_step[param] = self._step_one(param, param.grad, group)
        return loss

    def _step_one(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> State:
        state = self.state[param]
        if not state:
            self.state[param] = state = fresh_spam_state(param, group)
            self._redraw(param, group)
        state["step"] += 1  # on the CPU, as torch's own: reading it does not wait for the device
        interval = group["reset_interval"]
        resets = interval is not None and int(state["step"]) % interval == 0
        if resets:
            self._reset(param, group)
        statistics = spam_step(param, grad, state, group, warms_up=int(state["resets"]) > 0)
        return {**statistics, "reset": torch.full_like(statistics["nonfinite"], float(resets))}

    @torch.no_grad()
    def reset_moments(self) -> None:
        """Set the moments and their step count to zero, draw new subsets, and warm up over the next steps.

        Call it between steps: the next gradient enters the fresh moments. `MomentumResetCallback` does.
        """
        for group in self.param_groups:
            for param in group["params"]:
                if self.state.get(param):
                    self._reset(param, group)

    @property
    def statistics(self) -> dict[str, Tensor]:
        """What the last step saw: for each name a float vector with one entry per parameter, on their device.

        Entries follow the parameters of `param_groups`; a parameter without gradient has zeros. Empty before the
        first step. The names are those of `StableSPAM.statistics`; here each entry has a threshold of its own and
        nothing is normalised, so that ``clip_threshold`` is infinite and ``norm_factor`` 1.
        """
        if not self._last_step:
            return {}
        zero = torch.zeros_like(next(iter(self._last_step.values()))["grad_norm"])
        rows = [self._last_step.get(param) for param in self._params()]
        names = next(iter(self._last_step.values()))
        return {name: torch.stack([zero if row is None else row[name].to(zero) for row in rows]) for name in names}

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state saved by `state_dict`, with every tensor in the dtype in which it was saved.

        As with every torch optimizer the saved `param_groups` replace the options given to the constructor.

        Raises:
            ValueError: if a parameter's state lacks what the next step needs.
        """
        saved_ids = list(chain.from_iterable(group["params"] for group in state_dict["param_groups"]))
        super().load_state_dict(state_dict)
        groups = [group for group in self.param_groups for _ in group["params"]]
        for index, (saved_id, param, group) in enumerate(zip(saved_ids, self._params(), groups, strict=True)):
            if saved_id in state_dict["state"]:
                fresh, saved = fresh_spam_state(param, group), state_dict["state"][saved_id]
                if missing := [name for name in fresh if name not in saved]:
                    raise ValueError(
                        f"the state of parameter {index} must hold {', '.join(fresh)}, but lacks "
                        f"{', '.join(missing)}; it was saved by another optimizer: begin a new run from the weights"
                    )
                self.state[param] = {name: fresh[name].copy_(saved[name]) for name in fresh}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._last_step = {}
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)

    def _params(self) -> list[Tensor]:
        return list(chain.from_iterable(group["params"] for group in self.param_groups))

    def _reset(self, param: Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        for name in (*_MOMENTS, "moment_step"):
            state[name].zero_()
        state["resets"] += 1
        self._redraw(param, group)

    def _redraw(self, param: Tensor, group: dict[str, Any]) -> None:
        """A new subset, which depends on the seed, the parameter's place and the resets so far, and so resumes."""
        state = self.state[param]
        if "mask" in state:
            place = next(index for index, other in enumerate(self._params()) if other is param)
            seed = (group["seed"] * 1_000_003 + place) * 1_000_003 + int(state["resets"])
            state["mask"].copy_(draw_mask(param.numel(), group["density"], seed % 2**63, param.device))


def fresh_spam_state(param: Tensor, group: dict[str, Any]) -> State:
    """Two counters on the CPU (read by the host), one beside the moments; moments in the parameter's dtype."""
    state = {name: torch.zeros((), dtype=torch.float32) for name in ("step", "resets")}
    state["moment_step"] = torch.zeros((), dtype=torch.float32, device=param.device)
    if group["density"] < 1 and param.dim() == 2:
        state["mask"] = empty_mask(param.numel(), param.device)
        kept = kept_entries(param.numel(), group["density"])
        return state | {name: torch.zeros(kept, dtype=param.dtype, device=param.device) for name in _MOMENTS}
    return state | {name: torch.zeros_like(param, memory_format=torch.preserve_format) for name in _MOMENTS}
