"""LAE inside of the Trainer: one callback for each task's run."""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_stablespam._shared_errors import all_processes, shared_errors
from hf_stablespam.recipes.lae.adapters import (
    OFFLINE,
    ONLINE,
    adapter_parameters,
    add_expert,
    check_experts,
    copy_expert,
)
from hf_stablespam.recipes.lae.average import update_average
from hf_stablespam.recipes.lae.checks import check_countable, check_model, check_optimizer
from hf_stablespam.recipes.lae.model import LAEModel
from hf_stablespam.trainer.callbacks.helpers.kept_state import KeepsState
from hf_stablespam.trainer.callbacks.helpers.run_folder import learn_run_folders, run_folder

logger = logging.getLogger(__name__)

STALE_SHARE = 0.99  # of the offline expert that would still be the old one after a task: then it learns nothing


class LAECallback(KeepsState, TrainerCallback):
    r"""Runs one task of LAE (arXiv 2303.10070): freezes, averages, and keeps what a resumed run needs.

    Make one `Trainer` for each task, after `classifier.add_task`; so each task has a new optimizer and schedule. The
    callback trains the head of `task` and the online expert, old heads stay as they are. From the second task on, the
    online expert is frozen for the first epochs, so that the new head settles first, and after every optimizer step

    $$\theta_\mathrm{off} \leftarrow \alpha\,\theta_\mathrm{off} + (1 - \alpha)\,\theta_\mathrm{on}$$

    in float32 at least, once per update however many micro-batches it had. Before the second task the offline expert
    becomes a copy of the online one. A step after which the online expert is not finite leaves the average as it is; at
    the end a warning says how many there were, those before a resume among them.

    Checkpoints of the Trainer hold heads and both experts; ``lae_heads.safetensors``, ``lae.json`` and PEFT's files
    beside them make each a folder for `LAEModel.from_pretrained`. A frozen expert has no gradient; under DDP, which
    wants one, it is zero and is dropped before the optimizer step.

    Args:
        task: number of the task, from 0.
        ema_decay: $\alpha$ in [0, 1), default 0.9999 (the paper, with thousands of steps per task). Choose it so that
            $\alpha^\mathrm{steps\ per\ task}$ is about 0.5 to 0.9.
        num_freeze_epochs: for how many epochs the online expert is frozen, default 0; the paper: 3 of 5, 30 of 50.
        online: the adapter that is trained.
        offline: the adapter that is averaged.

    Raises:
        ValueError: an option out of its range. When the Trainer is made or training begins: a model that is not an
            `LAEModel`, a task without a head or trained already, missing or unequal adapters, no epoch left to train
            in, epochs to be frozen of data without a length, sharded parameters, a Trainer that was made before the
            previous task was trained, or from the second task on a checkpoint of a run without this callback.

    Example:
        >>> callback = LAECallback(task=1, ema_decay=0.99, num_freeze_epochs=3)
        >>> callback.is_frozen(epoch=2), callback.is_frozen(epoch=3), LAECallback(task=0).is_frozen(epoch=0)
        (True, False, False)
    """

    def __init__(
        self,
        task: int,
        ema_decay: float = 0.9999,
        num_freeze_epochs: int = 0,
        online: str = ONLINE,
        offline: str = OFFLINE,
    ) -> None:
        if task < 0:
            raise ValueError(f"task must be 0 or more, got {task}")
        if not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {ema_decay}; the paper's is 0.9999")
        if num_freeze_epochs < 0:
            raise ValueError(f"num_freeze_epochs must be 0 or more, got {num_freeze_epochs}")
        if online == offline:
            raise ValueError(f"online and offline must be two adapters, got {online!r} for both")
        learn_run_folders()
        self.task = task
        self.ema_decay = ema_decay
        self.num_freeze_epochs = num_freeze_epochs
        self.online = online
        self.offline = offline
        self._offline_is_new = False
        self._experts: tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]] = ([], [])  # online, offline
        self._frozen = False
        self._skipped: torch.Tensor | int = 0

    def arguments(self) -> dict[str, Any]:
        names = ("task", "ema_decay", "num_freeze_epochs", "online", "offline")
        return {name: getattr(self, name) for name in names}

    def knowledge(self) -> dict[str, Any]:
        return {"_skipped": self.skipped_updates}

    @property
    def skipped_updates(self) -> int:
        """After how many steps of the run, over its resumes, the online expert was not finite."""
        return int(self._skipped)

    def is_frozen(self, epoch: int) -> bool:
        """Whether the online expert is frozen in this epoch, counted from 0."""
        return self.task > 0 and epoch < self.num_freeze_epochs

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **others: Any
    ) -> None:
        check_model(model, args)
        self._check_task(model)
        experts = model.peft_model
        check_experts(experts, self.online)
        if self.task > 0 and self.offline not in experts.peft_config:
            add_expert(experts, self.offline, like=self.online)  # before a checkpoint is loaded, which fills it
            self._offline_is_new = True
        if self.offline in experts.peft_config and any(
            parameter.requires_grad for parameter in adapter_parameters(experts, self.offline).values()
        ):
            logger.warning("adapter %r was trainable; it is averaged, not trained, and was frozen", self.offline)
        self._choose_trainable(model)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **others: Any,
    ) -> None:
        check_model(model, args)
        self._check_task(model)
        self._choose_trainable(model)
        if optimizer is not None:
            check_optimizer(model, optimizer)
        saved = self.restored(state)
        self._skipped = saved.get("_skipped", 0)
        self._frozen = False
        model.task = self.task
        model.stop_features_gradient = False
        if self.task == 0:
            return
        if state.global_step and not saved:
            raise ValueError(
                f"a checkpoint must be of a run with LAECallback(task={self.task}), got one of step {state.global_step}"
                f" whose run had none: its steps are not in the average {self.offline!r}; resume from another, or train"
                " the task from its beginning"
            )
        check_countable(self.num_freeze_epochs, others.get("train_dataloader"))
        if self.num_freeze_epochs >= state.num_train_epochs:
            raise ValueError(
                f"num_freeze_epochs must be below the {state.num_train_epochs} epochs of this run, got "
                f"{self.num_freeze_epochs}; the online expert would never learn"
            )
        if state.global_step == 0 and self._offline_is_new and self.task > 1:
            raise ValueError(
                f"the model has no adapter {self.offline!r} from earlier tasks, only {[self.online]}; load it with "
                "LAEModel.from_pretrained, or resume from a checkpoint"
            )
        check_experts(model.peft_model, self.online, self.offline)
        if state.global_step == 0 and self.task == 1:
            copy_expert(model.peft_model, self.online, self.offline)
        online, offline = (adapter_parameters(model.peft_model, name) for name in (self.online, self.offline))
        self._experts = list(online.values()), [offline[key] for key in online]
        share = self.ema_decay**state.max_steps
        if share > STALE_SHARE:
            logger.warning(
                "ema_decay=%s leaves %.1f %% of the offline expert as it was after the %d steps of this task; about "
                "%.4g would leave 70 %%",
                *(self.ema_decay, 100 * share, state.max_steps, 0.7 ** (1 / max(1, state.max_steps))),
            )

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **others: Any
    ) -> None:
        self._freeze(model, args, self.is_frozen(int((state.epoch or 0) + 1e-6)))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **others: Any
    ) -> None:
        if self._frozen and model.stop_features_gradient:
            for parameter in self._experts[0]:
                parameter.grad = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **others: Any
    ) -> None:
        if self.task > 0:
            online, offline = self._experts
            self._skipped = self._skipped + ~update_average(offline, online, self.ema_decay)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **others: Any
    ) -> None:
        folder = run_folder(args, state) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        with shared_errors(all_processes()):
            if state.is_world_process_zero and folder.is_dir():
                model.save_pretrained(folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **others: Any
    ) -> None:
        self._freeze(model, args, False)
        model.tasks_trained.fill_(self.task + 1)
        if self.skipped_updates:
            logger.warning(
                "after %d steps the online expert was not finite; the offline expert was left as it was then",
                self.skipped_updates,
            )

    def _check_task(self, model: LAEModel) -> None:
        heads = len(model.classifier.heads)
        if self.task >= heads:
            raise ValueError(
                f"task must be below the number of heads, {heads}, got {self.task}; call classifier.add_task first"
            )
        if self.task < int(model.tasks_trained):
            raise ValueError(
                f"task {self.task} was trained already, {int(model.tasks_trained)} tasks are; take the next number"
            )

    def _choose_trainable(self, model: LAEModel) -> None:
        """The head of this task and the online expert, nothing else."""
        model.requires_grad_(False)
        model.classifier.heads[self.task].requires_grad_(True)
        model.peft_model.set_adapter(self.online)

    def _freeze(self, model: LAEModel, args: TrainingArguments, frozen: bool) -> None:
        self._frozen = frozen
        distributed = args.world_size > 1
        model.stop_features_gradient = frozen and distributed
        for parameter in adapter_parameters(model.peft_model, self.online).values():
            parameter.requires_grad_(distributed or not frozen)
            if frozen:
                parameter.grad = None
