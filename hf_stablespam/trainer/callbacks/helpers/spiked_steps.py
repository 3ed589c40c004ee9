"""What `SpikeRecorder` gathers of a run: what each step used, and the worst gradients of each."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import TrainingArguments

from hf_stablespam.monitor.spike_file import Spike
from hf_stablespam.monitor.spikes import TensorScores
from hf_stablespam.trainer.callbacks.helpers import accelerator_watch
from hf_stablespam.trainer.callbacks.helpers.data_indices import DataIndices
from hf_stablespam.trainer.callbacks.helpers.figures.step_figures import Watched, gradient_figures
from hf_stablespam.trainer.callbacks.helpers.unwrapping import unwrap

TENSORS_PER_STEP = 8  # recorded at most, those with the highest scores


class Step(NamedTuple):
    """What the host knows of one update step."""

    step: int
    learning_rates: list[Any]  # of each parameter
    data_indices: list[int] | None


class StepInputs:
    """Follows which samples and which learning rates each update step uses, from the beginning of training to its end.

    Args:
        dataloader: the Trainer's, as callbacks get it.
        optimizer: likewise.
        resumed_step: update steps behind a run that begins or goes on.
    """

    def __init__(self, dataloader: Any, optimizer: Any, resumed_step: int) -> None:
        self._data = DataIndices(dataloader)
        self._resumed_step: int | None = resumed_step
        self._learning_rates: list[Any] = []
        self._batches = 1
        # In the optimizer's own step: a warm-up callback changes the rates just before, and puts them back just after.
        self._hook = unwrap(optimizer).register_step_pre_hook(self._keep_learning_rates)

    def begin_epoch(self, args: TrainingArguments) -> None:
        """The dataloader begins anew."""
        self._data.begin_epoch(args, self._resumed_step)
        self._resumed_step = None

    def begin_step(self) -> None:
        """An update step begins with its first batch."""
        self._batches = 1

    def add_batch(self) -> None:
        """The step takes another batch."""
        self._batches += 1

    def of_step(self, step: int) -> Step:
        """What the step used whose update was just made."""
        return Step(step, self._learning_rates, self._data.take(self._batches))

    def close(self) -> None:
        """Leave dataloader and optimizer as they were found."""
        self._data.close()
        self._hook.remove()

    def _keep_learning_rates(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        rates = [(group["lr"], len(group["params"])) for group in optimizer.param_groups]
        # A rate that is a tensor is changed in place by the next step of its schedule.
        self._learning_rates = [rate.clone() if torch.is_tensor(rate) else rate for rate, n in rates for _ in range(n)]


class SpikedSteps:
    """The worst gradients of the steps since they were last read; they wait on the device.

    Args:
        watched: the parameters.
        above: score above which a gradient is a spike.
        restored: the running means of the run that goes on, empty for a new one.
    """

    def __init__(self, watched: Watched, above: float, restored: dict[str, Any]) -> None:
        self.watched = watched
        self._above = above
        self.scores = TensorScores(len(watched.params), watched.shards.device)
        self.scores.restore(restored)
        self._steps: list[Step] = []
        self._names: list[list[str]] = []  # of the parameters in each step
        self._found: list[Tensor] = []  # for each step (5, tensors): place, score, magnitude, threshold, non-finite
        self._losses: list[Tensor] = []

    def follow(self, watched: Watched) -> None:
        """Go on with other parameters, those that pruning has put in the place of the old."""
        self.scores.follow(watched.places_in(self.watched))
        self.watched = watched

    @torch.no_grad()
    def add(self, step: Step, optimizer: Any, clips: bool) -> None:
        """Take in the step that the optimizer has just made. For `clips` see `gradient_figures`."""
        figures = gradient_figures(self.watched, optimizer, self.watched.gradients(), clips)
        loss = accelerator_watch.step_loss(optimizer)
        self._found.append(self._worst(figures))
        self._losses.append(self._found[-1].new_tensor(math.nan) if loss is None else loss)
        self._steps.append(step)
        self._names.append(self.watched.names)

    def take(self) -> list[Spike]:
        """The spikes of the waiting steps, in one transfer, and none wait any more. All processes call it together."""
        if not self._found:
            return []
        found = torch.cat([rows.flatten() for rows in self._found])
        losses = _mean_over_processes(torch.stack([loss.float().reshape(()) for loss in self._losses]))
        values = torch.cat([found, losses.to(found.device)]).tolist()
        count = len(self._steps)
        sizes = [of_step.numel() for of_step in self._found]
        rows = [flat.view(5, -1) for flat in torch.tensor(values[:-count]).split(sizes)]
        spiked = [(of_step[1] > self._above) | (of_step[4] > 0) for of_step in rows]
        chosen = [index for index in range(count) if spiked[index].any()]
        indices = _of_all_processes([self._steps[index].data_indices for index in chosen])
        spikes: list[Spike] = []
        for index, of_step in zip(chosen, indices, strict=True):
            columns = rows[index][:, spiked[index]].T.tolist()
            spikes += [self._spike(index, column, values[-count + index], of_step) for column in columns]
        self._found, self._losses, self._steps, self._names = [], [], [], []
        return spikes

    def _worst(self, figures: dict[str, Tensor]) -> Tensor:
        """The tensors with the highest scores of a step, (5, tensors)."""
        score, usual = self.scores.update(figures["largest"])
        own = self._above * usual
        threshold = figures.get("clip_threshold", own)
        threshold = torch.where(threshold.isfinite(), threshold, own)
        order = torch.where(figures["nonfinite"] > 0, torch.inf, score)
        places = order.topk(min(TENSORS_PER_STEP, len(order))).indices
        rows = (score, figures["largest"], threshold, figures["nonfinite"])
        return torch.stack([places.to(score), *(row[places] for row in rows)])

    def _spike(self, index: int, column: Sequence[float], loss: float, data_indices: list[int] | None) -> Spike:
        step = self._steps[index]
        place, score, magnitude, threshold, nonfinite = int(column[0]), *column[1:]
        return Spike(
            step=step.step,
            tensor=self._names[index][place],
            magnitude=None if nonfinite else magnitude,
            threshold=threshold or None,
            score=None if nonfinite else score,
            loss=loss,
            learning_rate=float(step.learning_rates[place]) if step.learning_rates else None,
            data_indices=data_indices,
        )


def _mean_over_processes(losses: Tensor) -> Tensor:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        losses = losses / torch.distributed.get_world_size()
        torch.distributed.all_reduce(losses)
    return losses


def _of_all_processes(indices: list[list[int] | None]) -> list[list[int] | None]:
    """For each step the indices of all processes, one after the other."""
    if not (indices and torch.distributed.is_available() and torch.distributed.is_initialized()):
        return indices
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, indices)
    return [
        None if any(part is None for part in parts) else [index for part in parts for index in part]
        for parts in zip(*gathered, strict=True)
    ]
