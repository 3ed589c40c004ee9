"""GradientNormCallback: what the optimizer sees, in the Trainer's logs."""

import logging
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_stablespam.monitor.figures import By, Parts, sqnr_db
from hf_stablespam.monitor.spikes import SPIKE_SCORES, EntryScores, TensorScores
from hf_stablespam.monitor.window import Window
from hf_stablespam.trainer.callbacks.helpers import accelerator_watch
from hf_stablespam.trainer.callbacks.helpers.figures.expert_load import ExpertLoad
from hf_stablespam.trainer.callbacks.helpers.figures.quantization_error import squared_errors
from hf_stablespam.trainer.callbacks.helpers.figures.reporting import (
    ReportsFigures,
    add_to_logs,
    is_training_log,
    report_before_others,
)
from hf_stablespam.trainer.callbacks.helpers.figures.step_figures import Watched, gradient_figures
from hf_stablespam.trainer.callbacks.helpers.kept_state import KeepsState
from hf_stablespam.trainer.callbacks.helpers.unseen_updates import refuse_unseen_updates
from hf_stablespam.trainer.registration.flat_shards import refuse_flat_shards

logger = logging.getLogger(__name__)

PREFIX = "gradients/"


class GradientNormCallback(ReportsFigures, KeepsState, TrainerCallback):
    """Log what the optimizer sees and does: norms, clipped entries, spikes, updates, quantisation error.

    The figures are in every training log, beside the loss: in the console, `trainer_state.json`, TensorBoard, Weights &
    Biases, trackio. Their names begin with `gradients/`; most come with `_mean` and `_max` over the steps since the
    last log, so that no spike falls between two logs. `docs/monitoring.md` has them all.

    * For any optimizer: `norm` of the whole gradient, `largest` entry, `spike_score`, `spikes`, `nonfinite` gradients,
      `weight_norm`, `update_norm` and their `update_ratio`; with 4-bit layers `weight_sqnr_db`.
    * With `StableSPAM`, or behind `stabilize`: `stable_norm` (of the gradient that enters the moments), AdaClip's
      `clip_threshold`, the `clipped` entries and their `clipped_share`, AdaGN's `norm_factor`, `resets`.
    * With a mixture of experts, under `experts/`: `unused` experts, which got no token since the last log, and
      `load_max`, the largest share of its block's tokens that an expert got, over an even share.

    `norm`, `largest` and `clip_threshold` are of the gradient before the Trainer's own clipping (`max_grad_norm`).
    With gradient accumulation, DDP and FSDP2 they are those of the whole gradient, and the same on all processes.
    A figure that is not finite is left out of the log, because `nan` is no JSON.

    The figures stay on the device until a log is due; one transfer reads them. A checkpoint keeps those since the last
    log, and the running means of `spike_score="tensor"`, so that a resumed run logs what an undisturbed one does.

    Training is not changed, but making one wraps two things: `CallbackHandler.on_log`, because the Trainer calls the
    reporting integrations before the user's callbacks, and `Accelerator.clip_grad_norm_`, because the norm before
    clipping is known nowhere else.

    Args:
        by: also log figures by "block" (`norm/model.layers.0`, …) or by "tensor" (names as in `named_parameters`).
            Default None: of the whole model only.
        spike_score: "tensor" (default) compares the largest entry of each gradient tensor with its running mean
            over about 100 steps; a score above 10 counts as a spike. "entry" compares each entry with the mean of
            its own magnitude, as SPAM's paper does (arXiv 2501.06842), where 50 makes a spike; it keeps one float32
            number per trainable parameter, which is too much for checkpoints: after a resume it begins anew. None:
            neither.
        updates: weight and update norms. They need a copy of the trainable weights during the optimizer's step.
            Default True.

    Raises:
        ValueError: an argument that is none of these.

    Example:
        >>> callbacks = [GradientNormCallback(by="block")]  # for Trainer(..., callbacks=callbacks)
    """

    def __init__(
        self,
        by: By = None,
        *,
        spike_score: Literal["tensor", "entry"] | None = "tensor",
        updates: bool = True,
    ) -> None:
        self.by = _choice("by", by, ("block", "tensor"), "logs figures of the whole model only")
        self.spike_score = _choice("spike_score", spike_score, tuple(SPIKE_SCORES), "logs no score")
        if not isinstance(updates, bool):
            raise ValueError(f"updates must be True or False, got {updates!r}; False logs no update norms")
        self.updates = updates
        report_before_others()
        accelerator_watch.watch()
        self._experts: ExpertLoad | None = None  # while a run trains
        self._run: _Run | None = None  # from the first step on
        self._restored: dict[str, Any] = {}

    def arguments(self) -> dict[str, Any]:
        return {"by": self.by, "spike_score": self.spike_score, "updates": self.updates}

    def knowledge(self) -> dict[str, Any]:
        if self._run is None or self._experts is None:
            return self._restored
        return {**self._run.knowledge(), "experts": self._experts.knowledge()}

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        refuse_flat_shards(args, "GradientNormCallback")
        refuse_unseen_updates(self, args)
        if args.logging_strategy == "no":
            logger.warning("GradientNormCallback adds figures to the training logs, and logging_strategy is 'no'")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        refuse_flat_shards(args, "GradientNormCallback")
        refuse_unseen_updates(self, args, kwargs["optimizer"])
        self._run, self._restored = None, self.restored(state)
        self._stop_counting()
        self._experts = ExpertLoad(kwargs["model"], self._restored.get("experts", {}))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._stop_counting()

    def _stop_counting(self) -> None:
        if self._experts is not None:
            self._experts.close()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        accelerator_watch.forget(kwargs["optimizer"])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._run is None:
            # At the first step and not before: FSDP2 exchanges the parameters while it prepares the model.
            watched = Watched(kwargs["model"], kwargs["optimizer"])
            self._run = _Run(watched, self.by, self.spike_score, self._restored)
        elif not self._run.watched.are_those_of(kwargs["optimizer"]):
            self._run.follow(Watched(kwargs["model"], kwargs["optimizer"]))
        if self.updates:
            self._run.keep_weights()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._run is not None:
            self._run.add_step(kwargs["optimizer"], clips=args.max_grad_norm > 0)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if self._run is None or not is_training_log(logs):
            return
        weights, errors = squared_errors(kwargs["model"])
        figures, sums = self._run.window.take(errors.flatten())
        figures |= sqnr_db(weights, sums, self.by)
        named: dict[str, float] = {PREFIX + name: value for name, value in figures.items()}
        if self._experts is not None:
            named |= self._experts.take(by_block=self.by is not None)
        add_to_logs(named, logs, state.log_history)


class _Run:
    """What the callback gathers of one run, on the device.

    Args:
        watched: the parameters.
        by: see `GradientNormCallback`.
        spike_score: likewise.
        restored: `knowledge()` of the run that goes on, empty for a new one.
    """

    def __init__(
        self, watched: Watched, by: By, spike_score: Literal["tensor", "entry"] | None, restored: dict[str, Any]
    ) -> None:
        self.watched = watched
        self._by: By = by
        self._before: list[Tensor] = []  # weights before the optimizer's step
        self.window = Window(self._parts())
        self.window.restore(restored.get("window", {}), watched.shards.device)
        self._scores: TensorScores | EntryScores | None = None
        self._spike_above = SPIKE_SCORES[spike_score] if spike_score is not None else 0.0
        if spike_score == "tensor":
            self._scores = TensorScores(len(watched.params), watched.shards.device)
            self._scores.restore(restored.get("scores", {}))
        elif spike_score == "entry":
            self._scores = EntryScores(watched.weights())

    def follow(self, watched: Watched) -> None:
        """Go on with other parameters, those that pruning has put in the place of the old."""
        places, old = watched.places_in(self.watched), self.watched.params
        self.watched = watched
        self.window.follow(self._parts())
        if isinstance(self._scores, TensorScores):
            self._scores.follow(places)
        elif self._scores is not None:
            pairs = zip(places, watched.params, strict=True)
            same = [place if place is not None and old[place] is param else None for place, param in pairs]
            self._scores.follow(watched.weights(), same)

    def _parts(self) -> Parts:
        entries = [param.numel() for param in self.watched.params]
        return Parts(self.watched.names, entries, self._by, self.watched.shards.device)

    def knowledge(self) -> dict[str, Any]:
        """What a checkpoint keeps; JSON."""
        scores = self._scores.knowledge() if isinstance(self._scores, TensorScores) else {}
        return {"scores": scores, "window": self.window.knowledge()}

    def keep_weights(self) -> None:
        """Copy the weights, for the norm of the update that comes now."""
        self._before = [weight.clone() for weight in self.watched.weights()]

    @torch.no_grad()
    def add_step(self, optimizer: Any, clips: bool) -> None:
        """Take in the step that the optimizer has just made. For `clips` see `gradient_figures`."""
        gradients = self.watched.gradients()
        figures = gradient_figures(self.watched, optimizer, gradients, clips)
        if self._scores is not None:
            figures |= self._spike_figures(self._scores, figures, gradients)
        if self._before:
            figures |= self._update_figures()
        self.window.add(figures)

    def _spike_figures(
        self, scores: TensorScores | EntryScores, figures: dict[str, Tensor], gradients: list[Tensor]
    ) -> dict[str, Tensor]:
        if isinstance(scores, TensorScores):
            score = scores.update(figures["largest"]).score
        else:
            score = self.watched.shards.maxima(scores.update(gradients, figures["nonfinite"] == 0))
        return {"spike_score": score, "spikes": (score > self._spike_above).float()}

    def _update_figures(self) -> dict[str, Tensor]:
        weights = self.watched.weights()
        torch._foreach_sub_(self._before, weights)
        weight_norm, update_norm = self.watched.shards.norms(weights, self._before)
        self._before = []
        return {"weight_norm": weight_norm, "update_norm": update_norm}


def _choice(name: str, value: Any, choices: tuple[str, ...], without: str) -> Any:
    if value is not None and value not in choices:
        named = ", ".join(f'"{choice}"' for choice in choices)
        raise ValueError(f"{name} must be {named} or None, got {value!r}; None {without}")
    return value
