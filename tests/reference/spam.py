"""SPAM in float64, one line of the method after another; with a given subset of entries for the sparse form."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Hyperparameters:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    weight_decay: float = 0.0
    threshold: float | None = 5000.0
    clip_delay: int = 20
    reset_interval: int | None = 500
    warmup_steps: int = 150


@dataclass
class Reference:
    """One tensor's weight and state. `kept` (bool, shaped like the weight) says which entries are trained."""

    weight: Tensor
    options: Hyperparameters = field(default_factory=Hyperparameters)

    def __post_init__(self) -> None:
        self.weight = self.weight.detach().double().clone()
        self.first, self.second = torch.zeros_like(self.weight), torch.zeros_like(self.weight)
        self.t = self.k = self.resets = 0

    def step(self, grad: Tensor, kept: Tensor | None = None) -> Tensor:
        o = self.options
        self.t += 1
        if o.reset_interval is not None and self.t % o.reset_interval == 0:
            self.first, self.second, self.k = torch.zeros_like(self.first), torch.zeros_like(self.second), 0
            self.resets += 1
        if not torch.isfinite(grad).all():
            return self.weight
        kept = torch.ones_like(self.weight, dtype=torch.bool) if kept is None else kept
        grad = torch.where(kept, grad.detach().double(), 0)
        if o.threshold is not None and self.k >= o.clip_delay:
            spike = (grad**2 > o.threshold * self.second) & (self.second > 0)
            grad = torch.where(spike, grad.sign() * (o.threshold * self.second).sqrt(), grad)
        self.k += 1
        self.first = o.betas[0] * self.first + (1 - o.betas[0]) * grad
        self.second = o.betas[1] * self.second + (1 - o.betas[1]) * grad**2
        root = (self.second / (1 - o.betas[1] ** self.k)).sqrt() + o.eps
        update = o.lr * (self.first / (1 - o.betas[0] ** self.k)) / root
        if self.resets and self.k <= o.warmup_steps:
            update = update * (0.01 + 0.99 * (1 - math.cos(math.pi * (self.k - 1) / o.warmup_steps)) / 2)
        decayed = self.weight * (1 - o.lr * o.weight_decay)
        self.weight = torch.where(kept, decayed - update, self.weight)
        return self.weight
