"""Figures of our callbacks in the Trainer's own logs, in front of TensorBoard, W&B and the printer."""

import functools
from collections.abc import Mapping
from typing import Any

_MARK = "_hf_stablespam"


class ReportsFigures:
    """Mixin of callbacks that add figures to `logs`; they run before every other callback."""


def move_reporters_back(handler_cls: Any) -> None:
    """Make a `CallbackHandler` class put `ReportsFigures` callbacks first. Twice is harmless.

    The Trainer runs the reporting integrations before the user's callbacks, so what those add to `logs` would
    reach the printer and nothing else.
    """
    original = handler_cls.add_callback
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def add_callback(self: Any, callback: Any) -> None:
        original(self, callback)
        if isinstance(self.callbacks[-1], ReportsFigures):
            self.callbacks.insert(0, self.callbacks.pop())

    setattr(add_callback, _MARK, True)
    handler_cls.add_callback = add_callback


def is_training_log(logs: Mapping[str, Any]) -> bool:
    """Whether `logs` is one of the regular training logs, and not an evaluation's or the run's summary."""
    return "loss" in logs


def add_to_logs(figures: Mapping[str, float], logs: dict[str, Any], log_history: list[dict[str, Any]]) -> None:
    """Add `figures` to the logs that are being reported, and to the row that the Trainer has already kept."""
    logs.update(figures)
    if log_history:
        log_history[-1].update(figures)
