"""What `StableSPAM` and `SPAM` share as torch optimizers: groups, closures, statistics, loading without rounding."""

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from hf_stablespam.optim.options import Option, check_group, check_group_names, check_options
from hf_stablespam.optim.plan import Options, Result, State
from hf_stablespam.optim.state.low_bit import restore

STABILIZER = "stabilizer_"  # begins the names of what `stabilize` keeps in a state, for itself


class MeasuringOptimizer(Optimizer):
    """An optimizer that checks its options, measures the gradients that it sees, and resumes exactly."""

    table: Mapping[str, Option]
    _fresh_state: Callable[[Tensor, Options], State]  # of a parameter before its first step
    _last_step: list[Result]

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        check_options(self.table, defaults)
        self._last_step = []
        super().__init__(params, defaults)

    def _update(self) -> list[Result]:
        """Update all parameters that have a gradient, and say what was seen."""
        raise NotImplementedError

    def _before_loading(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The state dict that is loaded instead of one that somebody gave."""
        return state_dict

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own; what a group does not name it takes from the constructor.

        Raises:
            ValueError: for an option out of its range, or a parameter that cannot be trained with these options.
            TypeError: for a misspelt option.
        """
        if isinstance(param_group, dict):
            check_group_names(param_group, self.defaults)
            check_options(self.table, {**self.defaults, **param_group})
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups[-1])
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
            ValueError: for a sparse gradient, and for what else the optimizer's own description names.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._last_step = self._update()
        return loss

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

        For `SPAM`, where each entry has a threshold of its own and nothing is normalised, ``clip_threshold`` is
        infinite and ``norm_factor`` 1.
        """
        return ordered(self._last_step, chain.from_iterable(group["params"] for group in self.param_groups))

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state saved by `state_dict`; every tensor keeps the dtype in which the optimizer keeps it.

        As with every torch optimizer the saved `param_groups` replace the options given to the constructor.
        `StableSPAM` also loads what `torch.optim.AdamW` saved: options that were not saved keep their values, the run
        goes on from its step and with its moments, and one line of the log says so (see
        `hf_stablespam.optim.state.from_adamw`; its step count is read back to the host once).

        Args:
            state_dict: what `state_dict` returned.

        Raises:
            ValueError: if a parameter's state lacks what the next step needs, naming it, or if an optimizer without
                moments saved no state at all. Nothing is loaded then.
        """
        restored: dict[Tensor, State] = {}

        def prepare(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            states = {index: state for index, state in state_dict["state"].items() if _is_of_a_step(state)}
            state_dict = {**state_dict, "state": states}
            _check_not_stateless(state_dict)
            state_dict = self._before_loading(state_dict)
            restored.update(self._restored(state_dict))
            return {**state_dict, "state": {}}

        # Before torch touches anything, so that what is refused changes nothing; and torch casts what it loads to the
        # parameter's dtype: bfloat16 trackers would stall, counters lose digits.
        hooks = [
            self.register_load_state_dict_pre_hook(prepare),
            self.register_load_state_dict_post_hook(lambda _: self.state.update(restored), prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _restored(self, state_dict: dict[str, Any]) -> dict[Tensor, State]:
        """The state of each parameter from a saved one, under the options that come with it."""
        groups, states = list(zip(self.param_groups, state_dict["param_groups"], strict=False)), state_dict["state"]
        if any(len(own["params"]) != len(saved["params"]) for own, saved in groups):
            return {}  # of other groups, as torch's own error says
        new = {}
        for own, saved in groups:
            for index, param in zip(saved["params"], own["params"], strict=True):
                if index in states:
                    fresh, state = self._fresh_state(param, {**self.defaults, **saved}), states[index]
                    _check_same_shapes(index, fresh, state)
                    new[param] = {name: restore(fresh[name], state[name]) for name in fresh}
                    new[param] |= {name: state[name] for name in state if name.startswith(STABILIZER)}
        return new

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._last_step = []
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)


def _is_of_a_step(state: dict[str, Any]) -> bool:
    """Whether the optimizer itself has saved something; reading ``optimizer.state[param]`` leaves a state empty."""
    return any(not name.startswith(STABILIZER) for name in state)


def _check_not_stateless(state_dict: dict[str, Any]) -> None:
    """A run that had not begun left no state; one without moments has none either, and is told by its options."""
    foreign = [group for group in state_dict["param_groups"] if "betas" not in group]
    if foreign and not state_dict["state"]:
        options = ", ".join(name for name in foreign[0] if name not in ("params", "param_names", "initial_lr"))
        raise ValueError(
            f"the state must be of an optimizer with moments, got that of one with the options {options} and without "
            "any state; it was saved by another optimizer, so begin a new run from the weights alone"
        )


def _check_same_shapes(index: Any, fresh: State, saved: dict[str, Any]) -> None:
    """A saved state fits the options that it is loaded under."""
    for name, value in fresh.items():
        found = tuple(saved[name].shape) if name in saved else "none"
        if found != (wanted := tuple(value.shape)):
            raise ValueError(
                f"the state of parameter {index} must hold {name} of shape {wanted}, got {found}; "
                "it was saved by another optimizer, or without these options (rank, proj_type, density): load it with "
                "those of its run, or begin a new run from the weights alone"
            )


def ordered(results: list[Result], params: Iterable[Tensor]) -> dict[str, Tensor]:
    """What a step saw, in any order, in the order of all parameters, with zeros for those that were not seen."""
    if not results:
        return {}
    names, device = results[0].statistics, results[0].statistics["grad_norm"].device
    columns = {name: torch.cat([result.statistics[name].to(device) for result in results]) for name in names}
    # without a gradient: an entry past the end of what was seen, where a zero is put
    seen = {param: index for index, param in enumerate(chain.from_iterable(result.params for result in results))}
    order = torch.tensor([seen.get(param, len(seen)) for param in params], device=device)
    return {name: torch.cat([column, column.new_zeros(1)])[order] for name, column in columns.items()}
