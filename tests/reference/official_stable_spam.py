"""Stable-SPAM as the official code computes it, faults included: what the difference is measured against.

Written from the table in the documentation's page on the differences; `tests/reference/test_official.py` holds it to
recorded trajectories of the official code. Not for use in training.
"""

from __future__ import annotations

import math

import torch


class OfficialStableSPAM(torch.optim.Optimizer):
    """The update rule with the two faults of a reset.

    At a reset the state gets fresh zeros while the step goes on with the old moments, under the bias correction of a
    first step, and its gradient reaches no state. And the one counter starts again for the averages of AdaClip and
    AdaGN too: from the next step on they are full, but corrected as if they had just begun.

    Args:
        params: parameters.
        lr: learning rate.
        betas: decay rates of the moments.
        eps: added to both denominators.
        weight_decay: decoupled weight decay.
        clip_beta: the paper's γ3.
        norm_betas: the paper's γ1, γ2.
        reset_interval: steps between resets, the paper's ΔT; 0 for none.
        decay: update steps of the run, `total_T` of the official code, over which β1 and γ1 fall to a half and after
            which they rise again; None for none.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        clip_beta: float = 0.999,
        norm_betas: tuple[float, float] = (0.7, 0.9),
        reset_interval: int = 0,
        decay: int | None = None,
    ) -> None:
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, options)
        self.clip_beta, self.norm_betas = clip_beta, norm_betas
        self.reset_interval, self.decay = reset_interval, decay
        self.total_steps = 0

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.total_steps += 1
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group)
        return loss

    def _update(self, param: torch.Tensor, group: dict) -> None:
        state = self.state[param]
        if not state:
            state.update(step=0, first=torch.zeros_like(param), second=torch.zeros_like(param))
            state.update(clip_max=0.0, norm_mean=0.0, norm_sq=0.0)
        state["step"] += 1
        scale = self._scale()
        grad = self._clipped(param.grad, state)
        grad = self._normalized(grad, state, scale, group["eps"])
        first, second = state["first"], state["second"]  # after a reset still the old ones
        if self.reset_interval and self.total_steps % self.reset_interval == 0:
            state.update(step=1, first=torch.zeros_like(param), second=torch.zeros_like(param))
        step = state["step"]

        beta1, beta2 = group["betas"][0] * scale, group["betas"][1]
        param.mul_(1 - group["lr"] * group["weight_decay"])
        first.mul_(beta1).add_(grad, alpha=1 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        step_size = group["lr"] * math.sqrt(1 - beta2**step) / (1 - beta1**step)
        denominator = second.sqrt().add_(group["eps"] * math.sqrt(1 - beta2**step))
        param.addcdiv_(first, denominator, value=-step_size)

    def _clipped(self, grad: torch.Tensor, state: dict) -> torch.Tensor:
        largest = grad.abs().max()
        state["clip_max"] = self.clip_beta * state["clip_max"] + (1 - self.clip_beta) * largest
        threshold = state["clip_max"] / (1 - self.clip_beta ** state["step"])
        return torch.where(grad.abs() > threshold, grad / largest * threshold, grad)

    def _normalized(self, grad: torch.Tensor, state: dict, scale: float, eps: float) -> torch.Tensor:
        gamma1, gamma2 = self.norm_betas[0] * scale, self.norm_betas[1]
        norm = grad.norm()
        state["norm_mean"] = gamma1 * state["norm_mean"] + (1 - gamma1) * norm
        state["norm_sq"] = gamma2 * state["norm_sq"] + (1 - gamma2) * norm**2
        if norm == 0:
            return grad
        mean = state["norm_mean"] / (1 - gamma1 ** state["step"])
        square = state["norm_sq"] / (1 - gamma2 ** state["step"])
        return grad / norm * mean / (square.sqrt() + eps)

    def _scale(self) -> float:
        if self.decay is None:
            return 1.0
        return 0.5 + 0.25 * (1 + math.cos(math.pi * self.total_steps / (self.decay + 1)))
