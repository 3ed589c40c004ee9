"""GradientNormCallback: what the optimizer sees, in the Trainer's logs."""

from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_stablespam.monitor.statistics import Window, global_norm, stable_spam_figures
from hf_stablespam.trainer import clip_watch
from hf_stablespam.trainer.moments import unwrap
from hf_stablespam.trainer.reporting import ReportsFigures, add_to_logs, is_training_log

PREFIX = "gradients/"


class GradientNormCallback(ReportsFigures, TrainerCallback):
    """Log the norm of the gradient, for any optimizer, and with `StableSPAM` what it did to the gradient.

    In every training log, beside the loss, so in the console, `trainer_state.json`, TensorBoard and the others:

    * `gradients/norm`: L2 norm of the whole gradient at the logged step, before the Trainer's own clipping and
      before stabilising; `gradients/norm_mean` and `gradients/norm_max` over the steps since the last log;
    * with `StableSPAM`, or behind `stabilize`, also `gradients/stable_norm` (and `_mean`, `_max`), the norm after
      clipping and normalising, and over the steps since the last log `gradients/clipped` (entries that AdaClip
      scaled down), `gradients/nonfinite` (tensors with a non-finite gradient) and `gradients/resets`.

    The figures stay on the device; one transfer per log reads them.

    Example:
        >>> callbacks = [GradientNormCallback()]  # for Trainer(..., callbacks=callbacks), with any optimizer
    """

    def __init__(self) -> None:
        self._window = Window()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._window = Window()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        clip_watch.forget()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer = unwrap(kwargs["optimizer"])
        statistics = getattr(getattr(optimizer, "stabilizer", optimizer), "statistics", None)
        figures = stable_spam_figures(statistics) if statistics else {}
        if not figures or args.max_grad_norm > 0:
            figures["norm"] = raw_gradient_norm(kwargs["model"])
        self._window.add(figures)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if is_training_log(logs):
            figures = {PREFIX + name: value for name, value in self._window.take().items()}
            add_to_logs(figures, logs, state.log_history)


def raw_gradient_norm(model: torch.nn.Module) -> torch.Tensor:
    """The norm of the whole gradient before the Trainer's clipping (0-dim); call it in `on_optimizer_step`.

    There the gradients are still present and, in float16, no longer scaled.
    """
    norm = clip_watch.unclipped_norm()
    if norm is None:
        return global_norm(p.grad for p in model.parameters() if p.grad is not None)
    return torch.as_tensor(norm).detach()
