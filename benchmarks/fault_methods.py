"""What the fault benchmark compares: optimizers, Stable-SPAM's parts, what one would take instead, and the faults."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from hf_stablespam import SPAM, StableSPAM

STEPS, LONG, RATES = 100, 500, (0.05, 0.2, 0.01)
LEARNING_RATE, WARM_UP = 3e-3, 0.1  # of the steps, as in the demo
CLEAN, SPIKES = "none", ("entry x 1e4", "tensor x 1e3")
Parameters = list[torch.nn.Parameter]
Build = Callable[[Parameters, float, int], torch.optim.Optimizer]


def warm_up(steps: int) -> int:
    return max(1, round(WARM_UP * steps))


def reset_interval(steps: int) -> int:
    """Two resets fall into a run of any length."""
    return max(1, round(0.4 * steps))


def adamw(params: Parameters, rate: float, steps: int) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, rate, weight_decay=0)


def spam(params: Parameters, rate: float, steps: int) -> torch.optim.Optimizer:
    return SPAM(params, rate, reset_interval=reset_interval(steps), warmup_steps=warm_up(steps))


def stable_spam(params: Parameters, rate: float, steps: int, **options: Any) -> torch.optim.Optimizer:
    return StableSPAM(params, rate, **{"reset_interval": reset_interval(steps), "decay_steps": steps, **options})


class AdaGC:
    """Per-tensor clipping at λ times a running mean of the tensor's clipped norms (arXiv 2502.11034).

    As long as the rate warms up the whole gradient is clipped to a norm of 1, and each tensor's mean begins as the
    smallest norm that it had. The paper's first phase of 100 steps is that of runs of thousands.
    """

    def __init__(self, steps: int, factor: float = 1.05, beta: float = 0.98) -> None:
        self.first, self.factor, self.beta = warm_up(steps), factor, beta
        self.norms: dict[int, Tensor] = {}
        self.step = 0

    def __call__(self, params: Parameters) -> None:
        self.step += 1
        if self.step <= self.first:
            torch.nn.utils.clip_grad_norm_(params, 1.0)
        for param in params:
            assert param.grad is not None
            norm, usual = param.grad.norm(), self.norms.get(id(param), torch.tensor(1.0))
            if self.step <= self.first:
                self.norms[id(param)] = torch.minimum(usual, norm)
                continue
            scale = (self.factor * usual / norm).clamp(max=1.0)
            param.grad.mul_(scale)
            self.norms[id(param)] = self.beta * usual + (1 - self.beta) * norm * scale


class ZClip:
    """Clipping of the whole gradient where its norm is an outlier among those before (arXiv 2504.02507).

    ``z = (‖g‖ − μ) / σ``; above 2.5 the norm becomes ``μ + 2.5² / z · σ``. Mean and variance are running ones of the
    clipped norms, begun as those of the first 25.
    """

    def __init__(self, beta: float = 0.97, threshold: float = 2.5, first: int = 25) -> None:
        self.beta, self.threshold, self.first = beta, threshold, first
        self.seen: list[Tensor] = []
        self.mean = self.variance = torch.tensor(0.0)

    def __call__(self, params: Parameters) -> None:
        norm = torch.nn.utils.get_total_norm([param.grad for param in params if param.grad is not None])
        if len(self.seen) < self.first:
            self.seen.append(norm)
            if len(self.seen) == self.first:
                norms = torch.stack(self.seen)
                self.mean, self.variance = norms.mean(), norms.var(unbiased=False)
            return
        deviation = self.variance.sqrt() + 1e-6
        z = (norm - self.mean) / deviation
        target = norm
        if z > self.threshold:
            target = self.mean + self.threshold**2 / z * deviation
            for param in params:
                if param.grad is not None:
                    param.grad.mul_(target / norm)
        self.mean = self.beta * self.mean + (1 - self.beta) * target
        self.variance = self.beta * self.variance + (1 - self.beta) * (target - self.mean) ** 2


def clip_to_one(params: Iterable[Tensor]) -> None:
    torch.nn.utils.clip_grad_norm_(list(params), 1.0)


OPTIMIZERS: dict[str, Build] = {
    "AdamW": adamw,
    "AdamW + clipping": adamw,
    "SPAM": spam,
    "Stable-SPAM": stable_spam,
}
PARTS: dict[str, Build] = {
    "without AdaClip": functools.partial(stable_spam, clip_beta=None),
    "without AdaGN": functools.partial(stable_spam, norm_betas=None),
    "without resets": functools.partial(stable_spam, reset_interval=None),
}
INSTEAD: dict[str, Build] = {"AdaGC": adamw, "ZClip": adamw}
BUILD = {**OPTIMIZERS, **PARTS, **INSTEAD}
CLIPPING: dict[str, Callable[[int], Callable[[Parameters], None]]] = {  # before the step, made anew for each run
    "AdamW + clipping": lambda steps: clip_to_one,
    "AdaGC": AdaGC,
    "ZClip": lambda steps: ZClip(),
}


def largest_entry(grads: list[Tensor], hit: Tensor, generator: torch.Generator) -> None:
    hit.view(-1)[hit.abs().argmax()] *= 1e4


def whole_tensor(grads: list[Tensor], hit: Tensor, generator: torch.Generator) -> None:
    hit *= 1e3


def nan_entry(grads: list[Tensor], hit: Tensor, generator: torch.Generator) -> None:
    hit.view(-1)[torch.randint(hit.numel(), (), generator=generator)] = torch.nan


def inf_entry(grads: list[Tensor], hit: Tensor, generator: torch.Generator) -> None:
    hit.view(-1)[torch.randint(hit.numel(), (), generator=generator)] = torch.inf


def zeros(grads: list[Tensor], hit: Tensor, generator: torch.Generator) -> None:
    for grad in grads:
        grad.zero_()


FAULTS: dict[str, Callable[[list[Tensor], Tensor, torch.Generator], None]] = {
    "entry x 1e4": largest_entry,
    "tensor x 1e3": whole_tensor,
    "nan": nan_entry,
    "inf": inf_entry,
    "zeros": zeros,
}
