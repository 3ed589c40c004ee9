"""What a callback knows of the run so far, in checkpoints: in `trainer_state.json`, by the Trainer's own mechanism."""

from typing import Any

from transformers import TrainerState
from transformers.trainer_callback import ExportableState

_UNSAVED = "unsaved"  # in a place that no checkpoint has held yet; the first save writes over it


class KeepsState(ExportableState):
    """Mixin of callbacks that go on after a resume as if nobody had interrupted the run.

    They say what to keep (`arguments`, `knowledge`) and call `restored` in `on_train_begin`. All of it must be JSON.
    """

    def arguments(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        raise NotImplementedError

    def knowledge(self) -> dict[str, Any]:
        """What the next step needs to know of those before."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of this callback. The Trainer calls it."""
        return {"args": self.arguments(), "attributes": self.knowledge()}

    def restored(self, state: TrainerState) -> dict[str, Any]:
        """The `knowledge` in the checkpoint that a run goes on from; empty for a new run, and where it had no such.

        Of several callbacks of this class the one with the same arguments counts.

        Args:
            state: the Trainer's, as callbacks get it. A checkpoint of a run without this callback leaves no place for
                it, which the Trainer would miss when it saves: it gets one.
        """
        places: Any = state.stateful_callbacks
        name = type(self).__name__
        saved = places.get(name)
        if saved is None:
            places[name] = {**self.state(), _UNSAVED: True}
            return {}
        if _UNSAVED in saved:  # of another callback of this class, which the checkpoint did not have either
            places[name] = [{key: saved[key] for key in ("args", "attributes")}, self.state()]
            return {}
        if not state.global_step:
            return {}
        if isinstance(saved, list):
            # The Trainer appends to the list at each save: the newest come last.
            saved = next((one for one in reversed(saved) if one["args"] == self.arguments()), None)
        return saved["attributes"] if saved else {}
