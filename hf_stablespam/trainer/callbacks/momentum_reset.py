"""MomentumResetCallback: momentum resets, and a warm-up after each, for any Adam-like optimizer."""

import math
import statistics
from collections.abc import Iterable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_stablespam.trainer.callbacks.helpers import accelerator_watch
from hf_stablespam.trainer.callbacks.helpers.figures.reporting import (
    ReportsFigures,
    add_to_logs,
    is_training_log,
    report_before_others,
)
from hf_stablespam.trainer.callbacks.helpers.figures.step_figures import raw_gradient_norm
from hf_stablespam.trainer.callbacks.helpers.kept_state import KeepsState
from hf_stablespam.trainer.callbacks.helpers.moment_resets.checks import (
    check_sole_owner,
    integer,
    listed,
    say_what_never_comes,
    say_what_was_missed,
    spike_factor,
)
from hf_stablespam.trainer.callbacks.helpers.moment_resets.restart import Restart, restart_of
from hf_stablespam.trainer.callbacks.helpers.unseen_updates import refuse_unseen_updates
from hf_stablespam.trainer.callbacks.helpers.unwrapping import unwrap
from hf_stablespam.trainer.registration.flat_shards import refuse_flat_shards

PREFIX = "momentum/"
_FEWEST_NORMS = 5  # a median of fewer says nothing about what is usual


class MomentumResetCallback(ReportsFigures, KeepsState, TrainerCallback):
    """Reset the optimizer's moments at chosen steps or after gradient spikes, then warm the learning rate up.

    Works with every optimizer that keeps moments: its state begins anew, wherever it is. That the optimizer then goes
    on like a new one is tried before training, on small tensors, and one that does not is refused. With `StableSPAM`
    the callback takes the place of the optimizer's own `reset_interval`, which it switches off. Steps are counted as
    the Trainer does, from 1, and derived from `state.global_step`: a resumed run resets at the same steps. The training
    logs get `momentum/resets`, the resets since the last log, and with a warm-up `momentum/warmup`, the factor on the
    learning rate at that step.

    A reset by another callback, at a stage of `AdaptPruneCallback`, is counted and warmed up from like its own.

    After a reset the i-th step trains with `min(1, i / warmup_steps)` times the learning rate of whatever schedule
    the Trainer runs; the schedule itself does not notice. The `learning_rate` in the logs is the one trained with.

    Making one wraps `CallbackHandler.on_log`, so that the figures come before the reporting integrations, and
    `Accelerator.clip_grad_norm_`, for the norm before clipping.

    Args:
        every: reset at each step that this number of update steps divides, before the step's gradient enters the
            moments (ΔT in the paper); `None` for never.
        at: single steps to reset at, likewise.
        on_spike: reset when the norm of the whole gradient (before the Trainer's clipping) exceeds this many times
            its running median. The reset comes between that step and the next, so that the spike leaves the moments
            with it: it would otherwise dominate the fresh second moment for a long time. Reads one number from the
            device per step. `None` for never.
        warmup_steps: update steps of the warm-up after each reset; 0 for none.
        spike_window: update steps that the running median covers.
        spike_pause: update steps after a spike's reset in which no other spike resets.

    Raises:
        ValueError: an argument out of range, nothing to reset at, or a warm-up that would never end; at the start
            of training an optimizer without moments, or one that cannot be reset whole, a second such callback, or
            `reset_interval` in `optim_args`.

    Example:
        >>> callback = MomentumResetCallback(every=500, warmup_steps=50)
    """

    def __init__(
        self,
        every: int | None = None,
        at: Iterable[int] = (),
        on_spike: float | None = None,
        warmup_steps: int = 0,
        *,
        spike_window: int = 100,
        spike_pause: int = 100,
    ) -> None:
        report_before_others()
        accelerator_watch.watch()
        self.every = None if every is None else integer("every", every, 1, "None switches it off")
        self.at = sorted({integer("at", step, 1, "steps count from 1") for step in listed(at)})
        self.on_spike = spike_factor(on_spike)
        self.warmup_steps = integer("warmup_steps", warmup_steps, 0, "0 switches the warm-up off")
        self.spike_window = integer("spike_window", spike_window, _FEWEST_NORMS, "100 is usual")
        self.spike_pause = integer("spike_pause", spike_pause, 1, "100 is usual")
        if self.every is None and not self.at and self.on_spike is None:
            raise ValueError("MomentumResetCallback never resets: every, at and on_spike are all unset; set one")
        if self.on_spike is None and (self.spike_window, self.spike_pause) != (100, 100):
            raise ValueError(
                f"spike_window and spike_pause must be left out without on_spike, got {self.spike_window} and "
                f"{self.spike_pause}; set on_spike, such as 10"
            )
        if self.every is not None and self.warmup_steps >= self.every:
            raise ValueError(
                f"warmup_steps must be below every={self.every}, got {self.warmup_steps}: the next reset would come "
                "before the learning rate is back; use fewer"
            )
        self.norms: list[float] = []  # the last finite gradient norms, oldest first
        self.last_spike = 0  # the last step whose spike caused a reset
        self.last_outside = 0  # the last step at whose end another callback had the moments reset
        self.unlogged_resets = 0
        self._resets_seen = 0
        self._run: tuple[Restart, TrainerState] | None = None  # what resets, and the state of the present run
        self._factor = 1.0  # on the learning rate of the current step
        self._schedule_lrs: list[tuple[dict[str, Any], Any]] = []  # of which groups, while a warm-up has changed them

    def arguments(self) -> dict[str, Any]:
        names = ("every", "at", "on_spike", "warmup_steps", "spike_window", "spike_pause")
        return {name: getattr(self, name) for name in names}

    def knowledge(self) -> dict[str, Any]:
        self._notice_resets()  # of a callback that came after this one in the step that is being saved
        names = ("last_spike", "last_outside", "unlogged_resets")
        return {"norms": list(self.norms), **{name: getattr(self, name) for name in names}}

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        check_sole_owner(self, args, state)
        refuse_unseen_updates(self, args)
        if self.on_spike is not None:
            refuse_flat_shards(args, "MomentumResetCallback with on_spike")

    def before_loading(self, optimizer: Any) -> None:
        """Learn how the optimizer is reset, and that it can be, before a checkpoint is loaded into it.

        Raises:
            ValueError: from `restart_of`.
        """
        restart_of(optimizer)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        check_sole_owner(self, args, state)
        refuse_unseen_updates(self, args, kwargs["optimizer"])
        say_what_never_comes([*self.at, *([] if self.every is None else [self.every])], state.max_steps)
        self.before_loading(kwargs["optimizer"])
        # Here and not earlier: loading a checkpoint has just brought back the interval that was saved.
        for group in unwrap(kwargs["optimizer"]).param_groups:
            if "reset_interval" in group:
                group["reset_interval"] = None
        saved = self.restored(state)
        if not saved:
            say_what_was_missed(self.at, state.global_step)
        self._restore(saved)
        self._run, self._resets_seen = (restart_of(kwargs["optimizer"]), state), restart_of(kwargs["optimizer"]).resets

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        accelerator_watch.forget(kwargs["optimizer"])
        self._notice_resets()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step = state.global_step + 1
        if self._is_scheduled(step):
            self.unlogged_resets += 1
        if self._is_scheduled(step) or (self.last_spike and self.last_spike == step - 1):
            restart = restart_of(kwargs["optimizer"])
            restart.reset()
            self._resets_seen = restart.resets
        self._factor = self._warmup_factor(step)
        if self._factor < 1:
            self._schedule_lrs = [(group, group["lr"]) for group in kwargs["optimizer"].param_groups]
            for group, rate in self._schedule_lrs:
                group["lr"] = rate * self._factor

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._put_rates_back()
        if self.on_spike is not None and self._is_spike(
            float(raw_gradient_norm(kwargs["model"], kwargs["optimizer"])), state.global_step + 1
        ):
            # The reset itself comes before the next step: a checkpoint of now would otherwise hold no state at all.
            self.last_spike = state.global_step + 1
            self.unlogged_resets += 1

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.last_spike and self.last_spike == state.global_step and self._run is not None:
            self._run[0].reset()  # a second train() goes on with this optimizer
            self._resets_seen = self._run[0].resets

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if not is_training_log(logs):
            return
        figures: dict[str, float] = {PREFIX + "resets": self.unlogged_resets}
        if self.warmup_steps:
            figures[PREFIX + "warmup"] = self._factor
            if "learning_rate" in logs:
                figures["learning_rate"] = logs["learning_rate"] * self._factor
        add_to_logs(figures, logs, state.log_history)
        self.unlogged_resets = 0

    def _put_rates_back(self) -> None:
        """Schedulers that compute the next rate from the present one must find what they left."""
        for group, rate in self._schedule_lrs:
            group["lr"] = rate
        self._schedule_lrs = []

    def _restore(self, saved: dict[str, Any]) -> None:
        self.norms = list(saved.get("norms", []))
        self.last_spike = saved.get("last_spike", 0)
        self.last_outside = saved.get("last_outside", 0)
        self.unlogged_resets = saved.get("unlogged_resets", 0)
        self._factor = 1.0
        self._put_rates_back()  # of a run that broke off in the middle of a step

    def _notice_resets(self) -> None:
        """Count resets that others asked for, at the beginning of a stage of pruning for example."""
        if self._run is not None and self._run[0].resets > self._resets_seen:
            self.unlogged_resets += self._run[0].resets - self._resets_seen
            self._resets_seen = self._run[0].resets
            self.last_outside = self._run[1].global_step

    def _is_scheduled(self, step: int) -> bool:
        return step in self.at or (self.every is not None and step % self.every == 0)

    def _warmup_factor(self, step: int) -> float:
        """The factor on the learning rate of `step`, 1 outside of a warm-up."""
        if not self.warmup_steps:
            return 1.0
        first_steps = [first for first in self.at if first <= step]
        if self.every is not None and step >= self.every:
            first_steps.append(step - step % self.every)
        first_steps += [last + 1 for last in (self.last_spike, self.last_outside) if last]
        return min(1.0, (step - max(first_steps) + 1) / self.warmup_steps) if first_steps else 1.0

    def _is_spike(self, norm: float, step: int) -> bool:
        """Take `norm` into the running median; whether it stood out from those before it."""
        if not math.isfinite(norm):
            return False
        assert self.on_spike is not None
        usual = statistics.median(self.norms) if len(self.norms) >= _FEWEST_NORMS else math.inf
        self.norms = [*self.norms, norm][-self.spike_window :]
        rested = not self.last_spike or step - self.last_spike >= self.spike_pause
        return rested and norm > self.on_spike * usual
