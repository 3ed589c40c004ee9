"""Cut, train, cut, train: `prune_and_train`, with a Trainer and a new optimizer for each stage and one schedule."""

from __future__ import annotations

import copy
import gc
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.utils.data import Subset
from transformers import Trainer

from hf_stablespam.recipes.adapt_pruner.model.layers import count_parameters
from hf_stablespam.recipes.adapt_pruner.options import Options, absolute_target, check_target
from hf_stablespam.recipes.adapt_pruner.plan import PruningReport
from hf_stablespam.recipes.adapt_pruner.prune import adapt_prune
from hf_stablespam.recipes.adapt_pruner.training.callback import SavesWidths
from hf_stablespam.recipes.adapt_pruner.training.schedule import check_schedule, schedule_of_run
from hf_stablespam.recipes.adapt_pruner.training.shares import split_data, stage_targets
from hf_stablespam.recipes.adapt_pruner.training.train_batches import TrainBatches

logger = logging.getLogger(__name__)


def prune_and_train(
    model: Any,
    make_trainer: Callable[[Any, int], Trainer],
    target_parameters: int | float,
    *,
    stages: int,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    data_split: str = "linear",
    first_stage: int = 0,
    original_parameters: int | None = None,
    on_stage_end: Callable[[Trainer, int, PruningReport], None] | None = None,
    **options: Any,
) -> Any:
    """Prune a model to its target in stages, and train it after each: Adapt-Accel (arXiv 2502.03460).

    Stage ``k`` of ``K`` (from 1) cuts to ``P₀ − (P₀ − P*)·k // K`` parameters and trains on part ``k`` of the data. The
    arguments of the Trainer describe the whole run, which is divided here: its data, shuffled by `seed`, and, where
    ``max_steps`` is set, its steps, into parts of the same shares; ``num_train_epochs`` are those on each part. The
    learning rate follows one schedule over all stages; the optimizer is new in each.

    Works on one process and under DDP, where every process cuts as the first one says.

    Args:
        model: a causal language model of Llama's shape, not wrapped.
        make_trainer: called with the model and the number of the stage, from 0, it returns a `Trainer` for it with all
            the training data.
        target_parameters: ``P*``, of the last stage; a float is a share of those there are.
        stages: ``K``. The official runs have 5 to 20; one stage is an ordinary cut with recovery.
        calibration: as for `adapt_prune`; `None` draws 512 sequences of 64 tokens of the stage's data for each step.
        data_split: ``"linear"``: part ``k`` has a share of ``2k/(K(K+1))``, the published one; ``"constant"``, all
            alike; ``"cosine"``.
        first_stage: begin with this stage (from 0), with the model that the stage before has left. Default 0.
        original_parameters: ``P₀``, needed with `first_stage`. Default: those of the model.
        on_stage_end: called after each stage with the Trainer, the stage, and the report of its cut.
        options: ``steps``, ``amplitude``, ``ratio``, ``multiple_of``, ``prune_attention``, ``keep_layers``, ``seed``,
            ``equal_widths`` as for `adapt_prune`.

    Returns:
        `model`.

    Raises:
        ValueError: an option out of range, data without a length or too little of it, a schedule that cannot be
            continued, FSDP or DeepSpeed; and what `adapt_prune` raises.

    Example:
        >>> def make_trainer(model, stage):
        ...     return Trainer(model, TrainingArguments(f"out/{stage}", num_train_epochs=1), train_dataset=dataset)
        >>> model = prune_and_train(model, make_trainer, 0.5, stages=5, calibration=batches)  # doctest: +SKIP
    """
    whole = count_parameters(model) if original_parameters is None else original_parameters
    wanted = Options(**options)
    targets = stage_targets(whole, absolute_target(target_parameters, whole), stages)
    split_data(stages * (stages + 1), stages, data_split)  # for its errors
    if not 0 <= first_stage < stages or (first_stage and original_parameters is None):
        raise ValueError(
            f"first_stage must be from 0 to {stages - 1}, got {first_stage}; above 0 it needs original_parameters"
        )
    if targets[-1] < count_parameters(model):
        check_target(model, targets[-1], wanted)
    for stage in range(first_stage, stages):
        trainer: Any = make_trainer(model, stage)
        refuse_sharding(trainer)
        stage_steps = _divide(trainer, stage, stages, data_split, wanted.seed)
        if trainer.lr_scheduler is None:
            check_schedule(trainer.args, sum(stage_steps))
        batches = TrainBatches.of_trainer(trainer) if calibration is None else calibration
        report = adapt_prune(
            trainer.model,
            targets[stage],
            batches,
            **vars(wanted.of_cut(stage)),
            optimizer=trainer.optimizer,
            show_progress=not trainer.args.disable_tqdm,
        )
        trainer.add_callback(SavesWidths(report))
        _continue_schedule_of(trainer, sum(stage_steps), sum(stage_steps[:stage]))
        trainer.train()
        if on_stage_end is not None:
            on_stage_end(trainer, stage, report)
        _release(trainer)
        del trainer
        gc.collect()  # DDP's hooks on the parameters go with the wrapper, before the next one is made
    return model


def refuse_sharding(trainer: Trainer) -> None:
    """Raise under what shards or partitions parameters.

    Raises:
        ValueError: FSDP or DeepSpeed.
    """
    for name, on in (("FSDP", trainer.is_fsdp_enabled), ("DeepSpeed", trainer.is_deepspeed_enabled)):
        if on:
            raise ValueError(f"{name} shards the weights, of which whole units are cut; use DDP, or one process")


def _divide(trainer: Trainer, stage: int, stages: int, data_split: str, seed: int) -> list[int]:
    """Give the Trainer the stage's part of data and steps; returns the update steps of all stages."""
    trainer.args = args = copy.copy(trainer.args)  # one object may serve the Trainers of all stages
    data = trainer.train_dataset
    if data is None or not hasattr(data, "__len__"):
        raise ValueError(
            "prune_and_train divides the training data, so the Trainer needs a train_dataset with a length"
        )
    sizes = split_data(len(data), stages, data_split)
    start = sum(sizes[:stage])
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
    part = order[start : start + sizes[stage]]
    trainer.train_dataset = data.select(part) if hasattr(data, "select") else Subset(data, part)  # type: ignore[arg-type]
    if args.max_steps > 0:
        steps = split_data(args.max_steps, stages, data_split)
    else:
        steps = [math.ceil(args.num_train_epochs * _updates_per_epoch(args, size)) for size in sizes]
    args.max_steps = steps[stage]
    return steps


def _updates_per_epoch(args: Any, rows: int) -> int:
    batch = args.train_batch_size * args.world_size
    batches = rows // batch if args.dataloader_drop_last else math.ceil(rows / batch)
    return max(math.ceil(batches / args.gradient_accumulation_steps), 1)


def _continue_schedule_of(trainer: Any, total: int, done: int) -> None:
    """A new optimizer, under the schedule of the whole run at the place where this stage begins."""
    if trainer.lr_scheduler is None:  # else it is the caller's own
        trainer.create_optimizer()
        trainer.lr_scheduler = schedule_of_run(trainer.args, trainer.optimizer, total, done)


def _release(trainer: Any) -> None:
    """Take off what accelerate put around the model, so that the next stage does not wrap it twice."""
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    trainer.accelerator.free_memory()
    trainer.model_wrapped = trainer.model
