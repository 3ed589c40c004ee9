"""SpikeRecorder: which tensor spiked, when, and on which data."""

import math
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_stablespam.monitor.spike_file import FILE_NAME, SpikeFile
from hf_stablespam.monitor.spikes import SPIKE_SCORES
from hf_stablespam.trainer.callbacks.helpers import accelerator_watch
from hf_stablespam.trainer.callbacks.helpers.figures.reporting import is_training_log
from hf_stablespam.trainer.callbacks.helpers.figures.step_figures import Watched
from hf_stablespam.trainer.callbacks.helpers.kept_state import KeepsState
from hf_stablespam.trainer.callbacks.helpers.run_folder import learn_run_folders, run_folder
from hf_stablespam.trainer.callbacks.helpers.spiked_steps import SpikedSteps, StepInputs
from hf_stablespam.trainer.callbacks.helpers.unseen_updates import refuse_unseen_updates
from hf_stablespam.trainer.registration.flat_shards import refuse_flat_shards


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

    In a hyperparameter search each trial has its file, in the folder that the Trainer gives it.

    Making one wraps `Accelerator.clip_grad_norm_` and `Accelerator.backward`, where the norm before clipping and
    the loss of a step are, and `TrainerState.init_training_references`, which knows the trial; while it trains the
    batch sampler leaves a copy of the indices that it yields.

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
        learn_run_folders()
        self._inputs: StepInputs | None = None  # while a run trains
        self._steps: SpikedSteps | None = None  # from its first step on
        self._restored: dict[str, Any] = {}

    def arguments(self) -> dict[str, Any]:
        return {"keep": self.keep, "above": self.above}

    def knowledge(self) -> dict[str, Any]:
        return self._restored if self._steps is None else self._steps.scores.knowledge()

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        refuse_flat_shards(args, "SpikeRecorder")
        refuse_unseen_updates(self, args)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        refuse_flat_shards(args, "SpikeRecorder")
        refuse_unseen_updates(self, args, kwargs["optimizer"])
        self._steps, self._restored = None, self.restored(state)
        self._stop_following()
        self._file = SpikeFile(run_folder(args, state) / FILE_NAME, self.keep)
        if state.is_world_process_zero:
            self._file.drop_after(state.global_step)
        self._inputs = StepInputs(kwargs["train_dataloader"], kwargs["optimizer"], state.global_step)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._inputs is not None:
            self._inputs.begin_epoch(args)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        accelerator_watch.forget(kwargs["optimizer"])
        if self._inputs is not None:
            self._inputs.begin_step()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._inputs is not None:
            self._inputs.add_batch()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._inputs is None:
            return
        if self._steps is None:
            self._steps = SpikedSteps(Watched(kwargs["model"], kwargs["optimizer"]), self.above, self._restored)
        elif not self._steps.watched.are_those_of(kwargs["optimizer"]):
            self._steps.follow(Watched(kwargs["model"], kwargs["optimizer"]))
        step = self._inputs.of_step(state.global_step + 1)
        self._steps.add(step, kwargs["optimizer"], clips=args.max_grad_norm > 0)

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
        self._stop_following()

    def _stop_following(self) -> None:
        if self._inputs is not None:
            self._inputs.close()
        self._inputs = None

    def _write(self, state: TrainerState) -> None:
        spikes = [] if self._steps is None else self._steps.take()
        if spikes and state.is_world_process_zero:
            self._file.append(spikes)


# The same under the pattern of the other callbacks' names. The class keeps its own, which checkpoints hold.
SpikeRecorderCallback = SpikeRecorder
