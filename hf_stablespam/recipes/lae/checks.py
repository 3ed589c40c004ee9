"""What must hold of model, arguments and optimizer before a task of LAE is trained."""

from __future__ import annotations

from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import has_length

from hf_stablespam.recipes.lae.model import LAEModel
from hf_stablespam.trainer.registration.flat_shards import fsdp_version, zero_stage


def check_model(model: Any, args: TrainingArguments) -> None:
    if not isinstance(model, LAEModel):
        raise ValueError(
            f"LAECallback needs an LAEModel, got {type(model).__name__}; "
            "Trainer(model=LAEModel(add_lae_adapters(backbone, config), classifier), ...)"
        )
    if fsdp_version(args) is not None or zero_stage(args) > 0:
        raise ValueError("LAECallback averages whole adapters and does not work with FSDP or DeepSpeed ZeRO; use DDP")
    if args.label_smoothing_factor > 0:
        raise ValueError(
            f"label_smoothing_factor must be 0, got {args.label_smoothing_factor}: the Trainer's smoothed loss knows "
            "nothing of a task's classes"
        )


def check_optimizer(model: LAEModel, optimizer: Any) -> None:
    """An optimizer of an earlier moment would train other parameters, without any sign of it."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    wanted = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    missing = [name for key, name in wanted.items() if key not in held]
    if missing or held - wanted.keys():
        raise ValueError(
            f"the optimizer holds other parameters than those of this task (of {len(wanted)}, {len(missing)} are not "
            f"in it, and {len(held - wanted.keys())} others are); "
            "make each task's Trainer after the run of the task before"
        )


def check_countable(num_freeze_epochs: int, dataloader: Any) -> None:
    """Where the data have no length the Trainer does not know where an epoch ends, so nothing would be frozen."""
    if num_freeze_epochs and dataloader is not None and not has_length(dataloader):
        raise ValueError(
            f"num_freeze_epochs={num_freeze_epochs} counts epochs, and the training data have no length, so that the"
            " Trainer cannot; give a data set with a length, or num_freeze_epochs=0"
        )
