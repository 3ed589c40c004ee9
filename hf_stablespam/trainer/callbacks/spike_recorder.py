"""SpikeRecorder: which tensor spiked, when, and on which data."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_stablespam.monitor.spike_file import FILE_NAME, Spike, SpikeFile
from hf_stablespam.monitor.spikes import SPIKE_SCORES, TensorScores
from hf_stablespam.trainer.callbacks.helpers import accelerator_watch
from hf_stablespam.trainer.callbacks.helpers.data_indices import DataIndices
from hf_stablespam.trainer.callbacks.helpers.kept_state import KeepsState
from hf_stablespam.trainer.callbacks.helpers.moments import unwrap
from hf_stablespam.trainer.callbacks.helpers.reporting import is_training_log
from hf_stablespam.trainer.callbacks.helpers.step_figures import Watched, gradient_figures

TENSORS_PER_STEP = 8  # recorded at most, those with the highest scores


class _Step(NamedTuple):
    """One update step that is not yet written: what the host knows of it."""

    step: int
    learning_rates: list[Any]
    data_indices: list[int] | None


class SpikeRecorder(KeepsState, TrainerCallback):
    """Write the last gradient spikes of a run to `spikes.jsonl` in its output folder, for any optimizer.

    A tensor's gradient spikes when its largest entry, before the Trainer's own clipping, is more than `above` times
    the running mean of its largest entries (`hf_stablespam.monitor.spikes.TensorScores`); a gradient that is not
    finite is a spike too. For each of the (at most 8) worst tensors of such a step one line is written, with the fields
    of `hf_stablespam.monitor.spike_file.Spike`; `read_spikes` there reads them.

    Spikes wait on the device until the Trainer logs, saves or ends, and then are read in one transfer. They are in the
    file before a checkpoint is written, so that a crash loses those only that the resumed run will come to again. One
    process writes; losses are means over all processes, and data indices are those of all processes. The file never
    holds more than `keep` lines. A run that resumes from a checkpoint goes on with the file, without what came after
    the checkpoint, and with the running means; another run in the same folder begins a new file.

    Making one wraps `Accelerator.clip_grad_norm_` and `Accelerator.backward`, where the norm before clipping and
    the loss of a step are; while it trains the batch sampler leaves a copy of the indices that it yields.

    Args:
        keep: spikes to keep, the last ones. Default 1000.
        above: score above which a gradient counts as a spike. Default 10.

    Raises:
        ValueError: an argument out of its range.

    Example:
        >>> from transformers import Trainer
        >>> recorder = SpikeRecorder(keep=500)
        >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[recorder])  # doctest: +SKIP
    """

    def __init__(self, keep: int = 1000, *, above: float = SPIKE_SCORES["tensor"]) -> None:
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise ValueError(f"keep must be an integer of at least 1, got {keep!r}; 1000 is usual")
        if isinstance(above, bool) or not isinstance(above, int | float) or not 1 < above < math.inf:
            raise ValueError(f"above must be a finite number above 1, got {above!r}; 10 is usual")
        self.keep = keep
        self.above = float(above)
        accelerator_watch.watch()
        self._data: DataIndices | None = None
        self._hook: Any = None
        self._forget()

    def _forget(self) -> None:
        self._watched: Watched | None = None
        self._steps: list[_Step] = []
        self._found: list[Tensor] = []  # for each step (5, tensors): place, score, magnitude, threshold, non-finite
        self._losses: list[Tensor] = []
        self._learning_rates: list[Any] = []
        self._batches = 1
        self._restored: dict[str, Any] = {}

    def arguments(self) -> dict[str, Any]:
        return {"keep": self.keep, "above": self.above}

    def knowledge(self) -> dict[str, Any]:
        return self._restored if self._watched is None else self._scores.knowledge()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._forget()
        self._restored = self.restored(state)
        self._stop_watching()
        assert args.output_dir is not None, "the arguments fill it in"
        self._file = SpikeFile(Path(args.output_dir) / FILE_NAME, self.keep)
        if state.is_world_process_zero:
            self._file.drop_after(state.global_step)
        self._resumed_step: int | None = state.global_step
        self._data = DataIndices(kwargs["train_dataloader"])
        # In the optimizer's own step: a warm-up callback changes the rates just before, and puts them back just after.
        self._hook = unwrap(kwargs["optimizer"]).register_step_pre_hook(self._keep_learning_rates)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self._data is not None
        self._data.begin_epoch(args, self._resumed_step)
        self._resumed_step = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        accelerator_watch.forget(kwargs["optimizer"])
        self._batches = 1

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._batches += 1

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer = kwargs["optimizer"]
        if self._watched is None:
            self._watched = Watched(kwargs["model"], optimizer)
            self._scores = TensorScores(len(self._watched.params), self._watched.shards.device)
            self._scores.restore(self._restored)
        assert self._data is not None
        figures = gradient_figures(self._watched, optimizer, self._watched.gradients(), args.max_grad_norm > 0)
        loss = accelerator_watch.step_loss(optimizer)
        self._found.append(self._worst(figures))
        self._losses.append(self._found[-1].new_tensor(math.nan) if loss is None else loss)
        self._steps.append(_Step(state.global_step + 1, self._learning_rates, self._data.take(self._batches)))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # All processes log these together; a script may log others on one process, where the rest would be waited for.
        if is_training_log(kwargs["logs"]):
            self._write(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_save:
            self._write(state)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_save:
            self._write(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._write(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._write(state)
        self._stop_watching()

    def _stop_watching(self) -> None:
        if self._data is not None:
            self._data.close()
        if self._hook is not None:
            self._hook.remove()
        self._data, self._hook = None, None

    def _keep_learning_rates(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        rates = [(group["lr"], len(group["params"])) for group in optimizer.param_groups]
        # A rate that is a tensor is changed in place by the next step of its schedule.
        self._learning_rates = [rate.clone() if torch.is_tensor(rate) else rate for rate, n in rates for _ in range(n)]

    def _worst(self, figures: dict[str, Tensor]) -> Tensor:
        """The tensors with the highest scores of a step, (5, tensors)."""
        score, usual = self._scores.update(figures["largest"])
        own = self.above * usual
        threshold = figures.get("clip_threshold", own)
        threshold = torch.where(threshold.isfinite(), threshold, own)
        order = torch.where(figures["nonfinite"] > 0, torch.inf, score)
        places = order.topk(min(TENSORS_PER_STEP, len(order))).indices
        rows = (score, figures["largest"], threshold, figures["nonfinite"])
        return torch.stack([places.to(score), *(row[places] for row in rows)])

    def _write(self, state: TrainerState) -> None:
        """Read the waiting steps in one transfer and write their spikes."""
        if not self._found:
            return
        found = torch.stack(self._found).flatten()
        losses = _mean_over_processes(torch.stack([loss.float().reshape(()) for loss in self._losses]))
        values = torch.cat([found, losses.to(found.device)]).tolist()
        count = len(self._steps)
        rows = torch.tensor(values[:-count]).view(count, 5, -1)
        spiked = (rows[:, 1] > self.above) | (rows[:, 4] > 0)
        chosen = [index for index in range(count) if spiked[index].any()]
        indices = _of_all_processes([self._steps[index].data_indices for index in chosen])
        spikes: list[Spike] = []
        for index, of_step in zip(chosen, indices, strict=True):
            columns = rows[index][:, spiked[index]].T.tolist()
            spikes += [self._spike(self._steps[index], column, values[-count + index], of_step) for column in columns]
        if state.is_world_process_zero:
            self._file.append(spikes)
        self._found, self._losses, self._steps = [], [], []

    def _spike(self, step: _Step, column: Sequence[float], loss: float, data_indices: list[int] | None) -> Spike:
        assert self._watched is not None
        place, score, magnitude, threshold, nonfinite = int(column[0]), *column[1:]
        return Spike(
            step=step.step,
            tensor=self._watched.names[place],
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
