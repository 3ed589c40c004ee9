"""Gradient spike scores: how far a gradient stands out from those of the steps before it."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SMOOTHING = 0.99  # of the running mean: it looks back over about 100 steps
FEWEST_STEPS = 5  # a mean of fewer says nothing about what is usual
MOST = 10.0  # times the mean, as which the largest entry enters the mean at most: a spike is not to hide the next

# Score above which a gradient counts as a spike: of whole tensors our choice, of entries SPAM's (arXiv 2501.06842).
SPIKE_SCORES = {"tensor": 10.0, "entry": 50.0}


class Scores(NamedTuple):
    """What a tracker found in a step, one entry per tensor."""

    score: Tensor
    usual: Tensor


class TensorScores:
    """The largest entry of each tensor's gradient, compared with its running mean.

    ``score = max|g| / μ``, where ``μ`` is the debiased running mean of ``max|g|`` over the steps before (smoothing
    0.99; a value above ``10·μ`` enters as ``10·μ``). 0 for a gradient that is zero or not finite (neither enters the
    mean), and during the first five gradients of a tensor.

    Example:
        >>> scores = TensorScores(1, torch.device("cpu"))
        >>> for largest in (1.0, 1.0, 1.0, 1.0, 1.0, 30.0):
        ...     found = scores.update(torch.tensor([largest]))
        >>> found.score.round(decimals=3)
        tensor([30.])
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self._mean = torch.zeros(count, device=device)
        self._steps = torch.zeros(count, device=device)

    def update(self, largest: Tensor) -> Scores:
        """Scores of a step with these largest magnitudes (N,), which then enter the means."""
        usual = self._mean / (1 - SMOOTHING**self._steps).clamp_min(1e-30)
        seen = largest.isfinite() & (largest > 0)
        scored = seen & (self._steps >= FEWEST_STEPS)
        score = torch.where(scored, largest / usual, 0.0)
        value = torch.where(usual > 0, torch.minimum(largest, MOST * usual), largest)
        self._mean = torch.where(seen, torch.lerp(value, self._mean, SMOOTHING), self._mean)
        self._steps = self._steps + seen
        return Scores(score, usual)

    def follow(self, places: Sequence[int | None]) -> None:
        """Go on with other tensors: each has the mean of the one at this place before, None begins anew."""
        index = torch.tensor([place or 0 for place in places], device=self._mean.device)
        known = torch.tensor([place is not None for place in places], device=self._mean.device)
        self._mean, self._steps = (torch.where(known, row[index], 0.0) for row in (self._mean, self._steps))

    def knowledge(self) -> dict[str, list[float]]:
        """What the scores of the next steps depend on, as JSON; read from the device."""
        return {"mean": self._mean.tolist(), "steps": self._steps.tolist()}

    def restore(self, knowledge: Mapping[str, list[float]]) -> None:
        """Go on from what `knowledge` gave; from nothing where it is of another number of tensors."""
        mean, steps = (self._mean.new_tensor(knowledge.get(name, [])) for name in ("mean", "steps"))
        if mean.shape == steps.shape == self._mean.shape:
            self._mean, self._steps = mean, steps


class EntryScores:
    """SPAM's gradient spike score: each entry compared with the mean of its own magnitude over time.

    ``score = max_i |g_i| / mean_t |g_i|``, the mean over all gradients so far, this one included (arXiv 2501.06842), so
    that at the t-th it is at most t. Keeps one float32 number for each trainable parameter.
    """

    def __init__(self, shards: Sequence[Tensor]) -> None:
        self._means = [torch.zeros_like(shard, dtype=torch.float32) for shard in shards]
        self._steps = torch.zeros(len(shards), device=shards[0].device if shards else None)

    def follow(self, shards: Sequence[Tensor], places: Sequence[int | None]) -> None:
        """Go on with other tensors: each has the means of the one at this place before, None begins anew."""
        means, steps = self._means, [0 if place is None else self._steps[place] for place in places]
        self._steps = torch.stack([torch.as_tensor(step, device=self._steps.device).float() for step in steps])
        self._means = [
            torch.zeros_like(shard, dtype=torch.float32) if place is None else means[place]
            for shard, place in zip(shards, places, strict=True)
        ]

    def update(self, shards: Sequence[Tensor], finite: Tensor) -> list[Tensor]:
        """The 0-dim score of each gradient shard; where it is empty or `finite` (N,) false, 0, and in no mean."""
        seen = finite & torch.tensor([shard.numel() > 0 for shard in shards], device=finite.device)
        self._steps = self._steps + seen
        weights = seen / self._steps.clamp_min(1)
        return [
            _entry_score(mean, shard, weight.to(mean.device))
            for mean, shard, weight in zip(self._means, shards, weights.unbind(), strict=True)
        ]


def _entry_score(mean: Tensor, shard: Tensor, weight: Tensor) -> Tensor:
    if shard.numel() == 0:
        return mean.new_zeros(())
    magnitude = shard.abs().float()
    mean.lerp_(torch.where(weight > 0, magnitude, mean), weight)
    score = torch.where(mean > 0, magnitude / mean, 0.0).amax()
    return torch.where(weight > 0, score, 0.0)
