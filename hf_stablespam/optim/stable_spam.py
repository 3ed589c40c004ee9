"""The Stable-SPAM optimizer: options and state. A step is in `step`, the mathematics in `formulas` and `plan`."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from hf_stablespam.optim.base import MeasuringOptimizer
from hf_stablespam.optim.galore.step import apply_updates, split_projected, warn_of_clamped_rank
from hf_stablespam.optim.options import AUTO, STABLE_SPAM, check_gradient
from hf_stablespam.optim.plan import Batch, Options, Result
from hf_stablespam.optim.state.fresh import fresh_state
from hf_stablespam.optim.state.from_adamw import adopted
from hf_stablespam.optim.state.low_bit import clear_moments
from hf_stablespam.optim.step import step


class StableSPAM(MeasuringOptimizer):
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
            (``total_T`` in the official code). Default ``None``: ``s = 1``. ``"auto"``: the Trainer puts the run's in.
        decay_floor: the last value of ``s``, in [0, 1]. Default 0.5, the official code's.
        maximize: climb instead of descend. Default ``False``.
        foreach: force (``True``) or forbid (``False``) PyTorch's multi-tensor operations. Default ``None``: choose.
        fused: force or forbid compiled kernels. Default ``None``: choose what fits device, dtype and layout. On the CPU
            those are Numba's (extra ``cpu``; without it PyTorch's operations serve, with one warning); on CUDA ``True``
            asks for the Triton kernels, which no GPU has run yet. With both ``False`` one tensor comes after the other.
        state_dtype: dtype of ``M`` and ``V``, such as ``torch.float32`` for bfloat16 parameters. Default ``None``: the
            parameter's, but float32 for float16. Trackers are in float32; for float64 parameters all is in float64.
        stochastic_rounding: round new bfloat16 weights up or down at random, so that on average updates smaller than
            the distance of two bfloat16 numbers arrive (torch's generator). Default ``False``: to nearest.
        state_bits: 8 or 4 to keep ``M`` and ``V`` in so many bits with a scale per block (2.03 and 1.06 bytes per
            parameter; extra ``lowbit``, which is torchao). Default 32: as ``state_dtype`` says. Tensors of fewer than
            4096 entries, or not of whole blocks of 256 (128), are kept in full.
        rank: ``r`` of GaLore (arXiv 2403.03507; see `hf_stablespam.optim.galore`): clip, normalise and keep moments of
            a projection of each 2-dimensional gradient to so many directions. Give it to the groups of the attention
            and MLP weights. Above the smaller side of a matrix it is clamped, with one warning. Default ``None``: off.
        update_proj_gap: steps between new directions. Default 200, GaLore's.
        scale: ``α``, which multiplies the update of projected matrices. Default 0.25, GaLore's.
        proj_type: side that is projected: "std" (the default; the right one of a matrix with at least as many rows as
            columns, else the left one), "reverse_std", "left", "right" or "full" (both).
        reset_on_switch: reset the moments of a matrix when it gets new directions. Default ``False``.

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

    table = STABLE_SPAM

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
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        state_bits: int = 32,
        rank: int | None = None,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
        reset_on_switch: bool = False,
    ) -> None:
        given = locals()
        super().__init__(params, {name: given[name] for name in STABLE_SPAM})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of every optimizer here; and one warning where the rank has to be clamped."""
        super().add_param_group(param_group)
        warn_of_clamped_rank(self.param_groups[-1])

    _fresh_state = staticmethod(fresh_state)

    def _update(self) -> list[Result]:
        for group in self.param_groups:
            check_before_step(group)
        return update([(self._batch(group["params"], group), group) for group in self.param_groups])

    def _batch(self, params: list[Tensor], group: Options) -> Batch:
        return Batch.of(params, self.state, partial(fresh_state, options=group))

    def _before_loading(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return adopted(state_dict, self.param_groups)

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
            if state:
                clear_moments(state)


def update(batches: list[tuple[Batch, Options]]) -> list[Result]:
    """One step for parameters of some groups, whose projected matrices take it by their projections."""
    sorted_batches, projections = [], []
    for batch, options in batches:
        rest, projected = split_projected(batch, options)
        sorted_batches.append((rest, options))
        if projected is not None:
            sorted_batches.append((projected.low, projected.options))
            projections.append(projected)
    results = step(sorted_batches)
    return apply_updates(projections, results) if projections else results


def check_before_step(group: dict[str, Any]) -> None:
    """Raise a ValueError for a sparse gradient, and for ``decay_steps="auto"``."""
    # A step with a rate of zero and no gradients comes before a distributed checkpoint is loaded: it decides nothing.
    if group["decay_steps"] == AUTO and group["lr"] != 0:
        raise ValueError(
            "decay_steps must be a number of update steps or None when step() is called, got 'auto'; "
            "the Trainer puts the run's number in, elsewhere pass it yourself (optim_args='decay_steps=N')"
        )
    for param in group["params"]:
        check_gradient(param)
