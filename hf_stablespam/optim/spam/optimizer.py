"""SPAM, which Stable-SPAM came from: Adam with clipped spikes and reset momentum, also sparse."""

from functools import partial
from itertools import chain

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from hf_stablespam.optim.base import MeasuringOptimizer
from hf_stablespam.optim.options import SPAM as OPTIONS
from hf_stablespam.optim.options import check_gradient
from hf_stablespam.optim.plan import MOMENTS, Batch, Options, Result, State
from hf_stablespam.optim.spam.update import spam_step
from hf_stablespam.optim.state.fresh import moment_dtype
from hf_stablespam.optim.state.low_bit import clear_moments
from hf_stablespam.optim.state.sparse_mask import draw_mask, empty_mask, kept_entries


def fresh_spam_state(param: Tensor, group: Options) -> State:
    """Two counters on the CPU (read by the host), one beside the moments; moments as those of `StableSPAM`."""
    state = {name: torch.zeros((), dtype=torch.float32) for name in ("step", "resets")}
    state["moment_step"] = torch.zeros((), dtype=torch.float32, device=param.device)
    dtype = moment_dtype(param)
    if group["density"] < 1 and param.dim() == 2:
        state["mask"] = empty_mask(param.numel(), param.device)
        kept = kept_entries(param.numel(), group["density"])
        return state | {name: torch.zeros(kept, dtype=dtype, device=param.device) for name in MOMENTS}
    return state | {name: torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format) for name in MOMENTS}


class SPAM(MeasuringOptimizer):
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
    which they are, and each reset draws a new subset. A gradient with ``nan`` or ``inf`` leaves weight, moments and
    ``k`` of its tensor as they were. ``t`` counts the tensor's steps, those too, and a reset that falls on one is made:
    which subset is trained is decided on the host, without waiting for the device. ``p.grad`` is not changed.

    Where the official code differs: its bias correction goes on counting after a reset, weight decay does nothing
    beside ``density``, and sparse groups overwrite ``p.grad``.

    Args:
        params: as for `StableSPAM`, and so are ``lr``, ``betas``, ``weight_decay`` and ``maximize``.
        eps: ``ε``, ≥ 0. Default 1e-6, the official code's.
        threshold: ``θ``, how many times its second moment a squared entry may be, > 0. Default 5000, the
            paper's. ``None``: no clipping.
        clip_delay: gradients that must be in ``V`` before clipping begins, ≥ 0. Default 20, the official code's.
        reset_interval: ``ΔT``, steps between resets. Default 500, the paper's. ``None``: no resets.
        warmup_steps: ``N``, steps of the warm-up after each reset; 0 for none. Default 150, the paper's.
        density: share of the entries of 2-dimensional parameters that is trained between two resets, in (0, 1].
            Default 1.0: all.
        seed: of the random subsets. Default 0.

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

    table = OPTIONS
    _fresh_state = staticmethod(fresh_spam_state)

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
        given = locals()
        super().__init__(params, {name: given[name] for name in OPTIONS})

    def _update(self) -> list[Result]:
        for param in (param for group in self.param_groups for param in group["params"]):
            check_gradient(param, "SPAM")
        results = []
        for group in self.param_groups:
            batch = Batch.of(group["params"], self.state, partial(self._begin, group))
            for param, grad, state in zip(*batch, strict=True):
                row = self._step_one(param, grad, state, group)
                results.append(Result([param], {name: value.view(1) for name, value in row.items()}))
        return results

    def _begin(self, group: Options, param: Tensor) -> State:
        state = fresh_spam_state(param, group)
        self._redraw(param, state, group)
        return state

    def _step_one(self, param: Tensor, grad: Tensor, state: State, group: Options) -> dict[str, Tensor]:
        state["step"] += 1  # on the CPU, as torch's own: reading it does not wait for the device
        interval = group["reset_interval"]
        resets = interval is not None and int(state["step"]) % interval == 0
        if resets:
            self._reset(param, state, group)
        statistics = spam_step(param, grad, state, group, warms_up=int(state["resets"]) > 0)
        return {**statistics, "reset": torch.full_like(statistics["nonfinite"], float(resets))}

    @torch.no_grad()
    def reset_moments(self) -> None:
        """Set the moments and their step count to zero, draw new subsets, and warm up over the next steps.

        Call it between steps: the next gradient enters the fresh moments. `MomentumResetCallback` does.
        """
        for group in self.param_groups:
            for param in group["params"]:
                if state := self.state.get(param):
                    self._reset(param, state, group)

    def _reset(self, param: Tensor, state: State, group: Options) -> None:
        clear_moments(state)
        state["resets"] += 1
        self._redraw(param, state, group)

    def _redraw(self, param: Tensor, state: State, group: Options) -> None:
        """A new subset, which depends on the seed, the parameter's place and the resets so far, and so resumes."""
        if "mask" in state:
            params = chain.from_iterable(group["params"] for group in self.param_groups)
            place = next(index for index, other in enumerate(params) if other is param)
            seed = (group["seed"] * 1_000_003 + place) * 1_000_003 + int(state["resets"])
            state["mask"].copy_(draw_mask(param.numel(), group["density"], seed % 2**63, param.device))
