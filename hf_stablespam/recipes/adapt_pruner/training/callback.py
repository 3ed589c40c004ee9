"""Pruning inside of one Trainer run: `AdaptPruneCallback`."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_stablespam._announce import announce
from hf_stablespam._shared_errors import all_processes, shared_errors
from hf_stablespam.recipes.adapt_pruner.model.checkpoint import write_widths_of
from hf_stablespam.recipes.adapt_pruner.model.layers import count_parameters, find_layers
from hf_stablespam.recipes.adapt_pruner.model.optimizer_state import RESET, check_choice
from hf_stablespam.recipes.adapt_pruner.options import Options, absolute_target, check_target
from hf_stablespam.recipes.adapt_pruner.plan import PruningReport
from hf_stablespam.recipes.adapt_pruner.prune import adapt_prune
from hf_stablespam.recipes.adapt_pruner.training.shares import split_data, stage_targets
from hf_stablespam.recipes.adapt_pruner.training.train_batches import TrainBatches
from hf_stablespam.trainer.callbacks.helpers.figures.reporting import (
    ReportsFigures,
    add_to_logs,
    is_training_log,
    report_before_others,
)
from hf_stablespam.trainer.callbacks.helpers.kept_state import KeepsState
from hf_stablespam.trainer.callbacks.helpers.moment_resets.restart import learn_to_reset
from hf_stablespam.trainer.callbacks.helpers.run_folder import learn_run_folders, run_folder

logger = logging.getLogger(__name__)


class SavesWidths(ReportsFigures, TrainerCallback):
    """Puts pruning.json into every checkpoint, and the figures of the last cut into the next training log.

    Args:
        report: of a cut before training; `None`: none yet.
    """

    def __init__(self, report: PruningReport | None = None) -> None:
        report_before_others()
        learn_run_folders()
        self.unlogged: dict[str, float] = report.figures() if report is not None else {}

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.unlogged and is_training_log(kwargs["logs"]):
            add_to_logs(self.unlogged, kwargs["logs"], state.log_history)
            self.unlogged = {}

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = run_folder(args, state) / f"checkpoint-{state.global_step}"
        with shared_errors(all_processes()):
            if state.is_world_process_zero and (folder / "config.json").is_file():
                write_widths_of(kwargs["model"], folder)


class AdaptPruneCallback(KeepsState, SavesWidths):
    """Prune the model at chosen steps of one Trainer run, in stages, between two update steps.

    Cut ``k`` of ``K`` leaves ``P₀ − (P₀ − P*)·k // K`` parameters. With `stages` the first cut comes before the first
    step and each part of the run is as long as its part of the data in the official recipe: ``2k/(K(K+1))`` of it. The
    learning rate goes on as the Trainer has it. The next training log after a cut has ``pruning/parameters`` and
    ``pruning/sparsity_min``, ``_mean`` and ``_max``; `reports` has what was done.

    Every checkpoint gets ``pruning.json``. To go on from one: ``model = load_pruned(checkpoint)``, a Trainer with it
    and this callback, ``trainer.train(resume_from_checkpoint=checkpoint)``; cuts are not made twice. A callback that
    the checkpoint's run did not have counts from the parameters of the model that it meets, and cuts later on.

    A `MomentumResetCallback` beside it notices the reset and warms the learning rate up as after its own.

    Args:
        target_parameters: ``P*``, after the last cut; a float is a share of those there are when training begins.
        at_steps: update steps at whose end to cut; 0 is before the first. Either this or `stages`.
        stages: ``K``, cuts at the beginnings of as many parts of the run.
        calibration: as for `adapt_prune`; `None` takes 512 sequences of 64 tokens of the training data, anew in each
            step of the pruning.
        optimizer_state: ``"reset"`` or ``"keep"``, as for `prune_units`. Default ``"reset"``.
        data_split: with `stages`: ``"linear"`` (published), ``"constant"`` or ``"cosine"`` parts.
        options: ``steps``, ``amplitude``, ``ratio``, ``multiple_of``, ``prune_attention``, ``keep_layers``, ``seed``,
            ``equal_widths`` as for `adapt_prune`.

    Raises:
        ValueError: an option out of range; when the Trainer is made, more than one process, FSDP, DeepSpeed,
            ``torch_compile``, ``fp16``, ``load_best_model_at_end`` or ``auto_find_batch_size``; when training begins, a
            step past its end or before the checkpoint that has no such cut, or a target that cannot be reached.
        TypeError: when training begins, a model without decoder layers of Llama's shape.

    Example:
        >>> callback = AdaptPruneCallback(0.5, at_steps=[0, 200, 600])
        >>> callback.at_steps
        [0, 200, 600]
    """

    def __init__(
        self,
        target_parameters: int | float,
        at_steps: Sequence[int] | None = None,
        stages: int | None = None,
        calibration: Iterable[Mapping[str, Any]] | None = None,
        optimizer_state: str = RESET,
        *,
        data_split: str = "linear",
        **options: Any,
    ) -> None:
        super().__init__()
        if (at_steps is None) == (stages is None):
            raise ValueError(f"give either at_steps or stages, got at_steps={at_steps!r} and stages={stages!r}")
        self.at_steps = None if at_steps is None else _ascending(at_steps)
        self.options = Options(**options)
        check_choice(optimizer_state)
        absolute_target(target_parameters, 1)
        if stages is not None:
            split_data(stages * (stages + 1) if stage_targets(2, 1, stages) else 0, stages, data_split)
        self.target_parameters, self.stages, self.data_split = target_parameters, stages, data_split
        self.calibration, self.optimizer_state = calibration, optimizer_state
        self.original_parameters = 0
        self.cuts = 0  # that have been made
        self.reports: list[PruningReport] = []
        self._targets: list[int] = []
        self._steps: list[int] = []

    def arguments(self) -> dict[str, Any]:
        names = ("target_parameters", "at_steps", "stages", "optimizer_state", "data_split")
        options = {**vars(self.options), "keep_layers": list(self.options.keep_layers)}
        return {**{name: getattr(self, name) for name in names}, **options}

    def knowledge(self) -> dict[str, Any]:
        names = ("original_parameters", "cuts", "unlogged")
        return {name: getattr(self, name) for name in names}

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        refuse_arguments(args)

    def before_loading(self, optimizer: Any) -> None:
        """Learn how the optimizer is reset, before a checkpoint is loaded into it.

        Raises:
            ValueError: it cannot be reset whole.
        """
        if self.optimizer_state == RESET:
            learn_to_reset(optimizer)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        refuse_arguments(args)
        saved = self.restored(state)
        self.original_parameters = saved.get("original_parameters", count_parameters(model))
        self.cuts, self.unlogged = saved.get("cuts", 0), saved.get("unlogged", {})
        self.reports = []
        self._steps = self._cut_steps(state.max_steps)
        self._check_cuts_behind(state.global_step)
        target = absolute_target(self.target_parameters, self.original_parameters)
        self._targets = stage_targets(self.original_parameters, target, len(self._steps))
        find_layers(model)
        if target < count_parameters(model):
            check_target(model, target, self.options)
        if self.calibration is None and self.cuts < len(self._steps):
            TrainBatches.of_loader(kwargs["train_dataloader"])  # for its error, before any training
        self.before_loading(kwargs["optimizer"])
        self._cut_if_due(args, state, kwargs)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._cut_if_due(args, state, kwargs)

    def _cut_if_due(self, args: TrainingArguments, state: TrainerState, kwargs: dict[str, Any]) -> None:
        """Cut if this step is that of the next cut. A resumed run has made those before."""
        if self.cuts == len(self._steps) or state.global_step != self._steps[self.cuts]:
            return
        batches = self.calibration
        if batches is None:
            batches = TrainBatches.of_loader(kwargs["train_dataloader"])
        report = adapt_prune(
            kwargs["model"],
            self._targets[self.cuts],
            batches,
            **vars(self.options.of_cut(self.cuts)),
            optimizer=kwargs["optimizer"],
            optimizer_state=self.optimizer_state,
            show_progress=not args.disable_tqdm,
        )
        self.cuts += 1
        self.reports.append(report)
        self.unlogged = report.figures()
        announce(
            logger,
            "step %d: pruned from %d to %d parameters",
            *(state.global_step, report.parameters_before, report.parameters_after),
        )

    def _check_cuts_behind(self, step: int) -> None:
        """Raise unless the cuts that lie behind `step`, where training begins, are those that have been made."""
        name = "at_steps" if self.stages is None else f"stages={self.stages}"
        if self.cuts < len(self._steps) and self._steps[self.cuts] < step:
            raise ValueError(
                f"{name} must cut from step {step} on, where this run begins, got a cut at step"
                f" {self._steps[self.cuts]}, which the checkpoint's run has not made (of {self._steps}); give at_steps"
                f" from {step} on, or begin a new run"
            )
        behind = sum(cut <= step for cut in self._steps) if self.stages is None else len(self._steps)
        if self.cuts > behind:
            raise ValueError(
                f"{name} must begin with the {self.cuts} cuts that the checkpoint's run has made up to step {step}, got"
                f" {self._steps}; write their steps first, or begin a new run with the checkpoint's weights"
            )

    def _cut_steps(self, max_steps: int) -> list[int]:
        if self.at_steps is not None:
            if self.at_steps[-1] > max_steps:
                raise ValueError(
                    f"at_steps must be at most the {max_steps} steps of the run, got {self.at_steps[-1]}; cut earlier"
                )
            return self.at_steps
        assert self.stages is not None
        return [0, *accumulate(split_data(max_steps, self.stages, self.data_split))][: self.stages]


def refuse_arguments(args: TrainingArguments) -> None:
    """Raise for runs in which a replaced parameter would not be noticed, or a checkpoint not fit.

    Raises:
        ValueError: see `AdaptPruneCallback`.
    """
    if getattr(args, "fsdp", None):
        raise ValueError(
            f"fsdp={args.fsdp!r} shards the weights, of which whole units are cut; use prune_and_train and DDP"
        )
    if getattr(args, "deepspeed", None):
        raise ValueError("deepspeed partitions what the callback cuts; use prune_and_train on one process or under DDP")
    if args.world_size > 1:
        raise ValueError(
            f"world size must be 1 with AdaptPruneCallback, got {args.world_size}: DDP does not synchronise a parameter"
            " that was replaced after wrapping; use prune_and_train, which makes a Trainer per stage"
        )
    for name, why in (
        ("torch_compile", "the model would be compiled for widths that it loses"),
        ("fp16", "gradients in float16 underflow in the calibration; use bf16=True"),
        ("load_best_model_at_end", "a checkpoint from before a cut does not fit the model after it"),
        ("auto_find_batch_size", "another try begins with the model as it was cut, and would cut again; choose a size"),
    ):
        if getattr(args, name, False):
            raise ValueError(f"{name}=True does not go with AdaptPruneCallback: {why}")


def _ascending(steps: Any) -> list[int]:
    listed: list[Any] = list(steps) if isinstance(steps, Iterable) and not isinstance(steps, str) else [None]
    whole = all(type(step) is int and step >= 0 for step in listed)
    if not listed or not whole or listed != sorted(set(listed)):
        raise ValueError(
            f"at_steps must be ascending steps from 0, at least one, got {steps!r}; write at_steps=[100, 200]"
        )
    return listed
