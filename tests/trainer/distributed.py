"""Trainer runs that one process and several can both do: the same global batch, faults at the same steps."""

import json
import os
from pathlib import Path

import torch
from accelerate.state import DistributedType, PartialState
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_stablespam import FourBitCallback, FourBitConfig
from tests.quant.layers.mixtures import FORMATS, mixture
from tests.trainer.helpers import RandomTokens, arguments, optimizer_of, tiny_llama, training_logs

STEPS = 12
SPIKE_STEP, RESET_INTERVAL = 7, 5  # both after the checkpoint at half of the steps, and a reset before it
GLOBAL_BATCH = 4
FSDP_CONFIG = json.loads((Path(__file__).parents[2] / "examples" / "configs" / "fsdp2.json").read_text())


class Stop(TrainerCallback):
    """Ends a run early, with the schedule of the whole run."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = True


class Spike(TrainerCallback):
    """Multiplies one entry of every gradient at one step, wherever that entry lives."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == SPIKE_STEP:
            for param in model.parameters():
                factors = torch.ones(param.shape, dtype=param.dtype)
                factors.view(-1)[-1] = 1e4
                if isinstance(param, DTensor):
                    factors = distribute_tensor(factors, param.device_mesh, param.placements, src_data_rank=None)
                param.grad.mul_(factors)


def run(
    output_dir,
    *,
    fsdp: str | None = None,
    resume: str | None = None,
    stop_at: int = STEPS,
    trainer_cls: type[Trainer] = Trainer,
    **overrides,
) -> Trainer:
    """A run of `STEPS` steps in 4 bits with accumulation, resets and a spike.

    Args:
        fsdp: FSDP2's kind of state dict (`"FULL_STATE_DICT"`, `"SHARDED_STATE_DICT"`), `None` for DDP or one process.
        resume: the checkpoint to go on from.
        stop_at: the step after which the run ends.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    options = {
        "max_steps": STEPS,
        "per_device_train_batch_size": GLOBAL_BATCH // world_size,
        "gradient_accumulation_steps": 2,
        "weight_decay": 0.1,
        "lr_scheduler_type": "cosine",
        "optim_args": f"reset_interval={RESET_INTERVAL}",
        "logging_steps": 1,
        **overrides,
    }
    if fsdp is not None:
        options |= fsdp_options(fsdp)
    args = arguments(output_dir, **options)
    if fsdp is not None:
        let_fsdp_run_on_the_cpu(args)
    trainer = trainer_cls(
        model=tiny_llama(),
        args=args,
        train_dataset=RandomTokens(rows=STEPS * 2 * GLOBAL_BATCH),
        callbacks=[FourBitCallback(FourBitConfig(group_size=8)), Spike(), Stop(stop_at)],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def run_mixture(output_dir, family: str, name: str, *, fsdp: bool, resume: str | None = None, **overrides) -> Trainer:
    """Four steps of a mixture in a format, with gradient checkpointing; the first two are saved."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    options = {
        "max_steps": 4,
        "per_device_train_batch_size": GLOBAL_BATCH // world_size,
        "gradient_checkpointing": True,
        "save_strategy": "steps",
        "save_steps": 2,
        **(fsdp_options() if fsdp else {}),
        **overrides,
    }
    args = arguments(output_dir, **options)
    if fsdp:
        let_fsdp_run_on_the_cpu(args)
    callbacks = [FourBitCallback(FORMATS[name])]
    trainer = Trainer(mixture(family), args, train_dataset=RandomTokens(rows=16), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def fsdp_options(kind: str = "FULL_STATE_DICT") -> dict:
    """What TrainingArguments need for FSDP2. transformers 4 takes some of it from the environment only."""
    os.environ |= {"FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_STATE_DICT_TYPE": kind}
    return {"fsdp": "full_shard auto_wrap", "fsdp_config": {**FSDP_CONFIG, "state_dict_type": kind}}


def result_of(trainer: Trainer) -> dict:
    """Losses, weights and optimizer state by the names of the parameters, as whole tensors."""
    optimizer = optimizer_of(trainer)
    names = {param: name.removeprefix("module.") for name, param in trainer.model_wrapped.named_parameters()}
    return {
        "losses": [row["loss"] for row in training_logs(trainer)],
        "weights": {name: whole(param.detach()) for param, name in names.items()},
        "states": {
            names[param]: {key: whole(value) for key, value in state.items()}
            for param, state in optimizer.state.items()
        },
        "statistics": optimizer.statistics,
        "decay_steps": {group["decay_steps"] for group in optimizer.param_groups},
        "sharded": sorted(name for param, name in names.items() if isinstance(param, DTensor)),
    }


def whole(value):
    return value.full_tensor() if isinstance(value, DTensor) else value


def let_fsdp_run_on_the_cpu(args: TrainingArguments) -> None:
    """accelerate would otherwise train with DDP, silently, where there is no accelerator."""
    assert args._setup_devices.type == "cpu"
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
