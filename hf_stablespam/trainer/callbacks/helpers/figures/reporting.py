"""Figures of our callbacks in the Trainer's own logs, in front of TensorBoard, W&B and the printer."""

from collections.abc import Mapping
from typing import Any

from transformers.trainer_callback import CallbackHandler

from hf_stablespam.trainer.patching import patch


class ReportsFigures:
    """Mixin of callbacks that add figures to `logs`. Their constructors call `report_before_others`."""


def report_before_others() -> None:
    """Make `CallbackHandler.on_log` call the `ReportsFigures` callbacks first. Twice is harmless.

    The Trainer runs the reporting integrations before the user's callbacks, so what those add to `logs` would
    reach the printer and nothing else. The other callbacks keep their order.
    """
    patch(CallbackHandler, "on_log", _sorted_first)


def _sorted_first(original: Any) -> Any:
    # When it logs and not when a callback is added: by then the first of ours may be under construction.
    def on_log(self: Any, *args: Any, **kwargs: Any) -> Any:
        # A new list: this may be called from a callback, while the handler goes through its list.
        self.callbacks = sorted(self.callbacks, key=lambda callback: not isinstance(callback, ReportsFigures))
        return original(self, *args, **kwargs)

    return on_log


def is_training_log(logs: Mapping[str, Any]) -> bool:
    """Whether `logs` is one of the regular training logs, and not an evaluation's or the run's summary."""
    return "loss" in logs


def add_to_logs(figures: Mapping[str, float], logs: dict[str, Any], log_history: list[dict[str, Any]]) -> None:
    """Add `figures` to the logs that are being reported, and to the row that the Trainer has already kept."""
    logs.update(figures)
    if log_history:
        log_history[-1].update(figures)
