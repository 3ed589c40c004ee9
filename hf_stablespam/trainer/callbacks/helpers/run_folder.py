"""The folder that a run writes to: `output_dir`, or in a hyperparameter search that of the trial."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerState, TrainingArguments

from hf_stablespam.trainer.patching import patch

_NAME = "run_folder"  # an attribute and no field, so that no checkpoint holds it


def learn_run_folders() -> None:
    """From now on a state knows the folder of its trial, which the Trainer tells no callback."""
    patch(TrainerState, "init_training_references", _noting)


def run_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Where checkpoints of this run are, once training has begun.

    Args:
        args: the Trainer's.
        state: the Trainer's, as callbacks get it.
    """
    return Path(str(getattr(state, _NAME, args.output_dir)))


def _noting(original: Callable[..., Any]) -> Callable[..., Any]:
    def init_training_references(self: TrainerState, trainer: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, trainer, *args, **kwargs)
        trial = getattr(trainer, "_trial", None)
        if trial is not None and self.is_world_process_zero:
            setattr(self, _NAME, trainer._get_output_dir(trial))
        return result

    return init_training_references
