"""Stable-SPAM in float64, one Python number at a time where it can be: the table of the method, line by line."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Hyperparameters:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_beta: float | None = 0.999
    norm_betas: tuple[float, float] | None = (0.7, 0.9)
    reset_interval: int | None = 1000
    decay_steps: int | None = None
    decay_floor: float = 0.5


@dataclass
class Reference:
    """One tensor's weight and state; `step` is one row of the table after another."""

    weight: Tensor
    options: Hyperparameters = field(default_factory=Hyperparameters)

    def __post_init__(self) -> None:
        self.weight = self.weight.detach().double().clone()
        self.first, self.second = torch.zeros_like(self.weight), torch.zeros_like(self.weight)
        self.clip_max = self.norm_mean = self.norm_sq = 0.0
        self.t = self.k = 0

    def step(self, grad: Tensor) -> Tensor:
        if not torch.isfinite(grad).all():
            return self.weight
        o = self.options
        grad = grad.detach().double().clone()
        self.t += 1
        s = self._decay()

        if o.clip_beta is not None:
            largest = grad.abs().max().item()
            self.clip_max = o.clip_beta * self.clip_max + (1 - o.clip_beta) * largest
            threshold = self.clip_max / (1 - o.clip_beta**self.t)
            if largest > threshold:
                grad = torch.where(grad.abs() > threshold, grad / largest * threshold, grad)

        if o.norm_betas is not None:
            gamma1, gamma2 = s * o.norm_betas[0], o.norm_betas[1]
            norm = grad.norm().item()
            self.norm_mean = gamma1 * self.norm_mean + (1 - gamma1) * norm
            self.norm_sq = gamma2 * self.norm_sq + (1 - gamma2) * norm**2
            mean_hat = self.norm_mean / (1 - gamma1**self.t)
            square_hat = self.norm_sq / (1 - gamma2**self.t)
            if norm > 0:
                grad = grad / norm * (mean_hat / (math.sqrt(square_hat) + o.eps))

        if o.reset_interval is not None and self.t % o.reset_interval == 0:
            self.first, self.second, self.k = torch.zeros_like(grad), torch.zeros_like(grad), 0

        self.k += 1
        beta1, beta2 = s * o.betas[0], o.betas[1]
        self.weight = self.weight * (1 - o.lr * o.weight_decay)
        self.first = beta1 * self.first + (1 - beta1) * grad
        self.second = beta2 * self.second + (1 - beta2) * grad**2
        denominator = (self.second / (1 - beta2**self.k)).sqrt() + o.eps
        self.weight = self.weight - o.lr * (self.first / (1 - beta1**self.k)) / denominator
        return self.weight

    def _decay(self) -> float:
        o = self.options
        if o.decay_steps is None:
            return 1.0
        period = o.decay_steps + 1
        cosine = math.cos(math.pi * min(self.t, period) / period)
        return o.decay_floor + (1 - o.decay_floor) * (1 + cosine) / 2
