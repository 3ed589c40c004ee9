"""Which run a stage's folder belongs to: `train_target` goes on with that one, and with no other."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from hf_stablespam._atomic import atomic_file
from hf_stablespam._shared_errors import all_processes, shared_errors
from hf_stablespam.quant import FourBitConfig
from hf_stablespam.trainer import last_complete_checkpoint

logger = logging.get_logger(__name__)

FINISHED = "trainer_state.json"  # written last into a stage's folder
RUN_FILE = "fusechat_run.json"  # written first
# What a stage learns; other arguments say where it runs, and what it logs, evaluates and saves.
DEFINING = (
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio"),
    *("num_train_epochs", "max_steps", "seed", "data_seed", "optim", "optim_args", "max_grad_norm", "weight_decay"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "label_smoothing_factor", "neftune_noise_alpha", "max_length"),
    *("packing", "completion_only_loss", "assistant_only_loss", "truncation_mode", "disable_dropout"),
    *("beta", "loss_type", "loss_weights", "ld_alpha", "f_divergence_type", "label_smoothing", "use_weighting"),
    *("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
)


class StageRun(ExportableState, TrainerCallback):
    """Says in every checkpoint of which run it is.

    Args:
        run: its name.
    """

    def __init__(self, run: str) -> None:
        self.run = run

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps. The Trainer calls it."""
        return {"args": {"run": self.run}, "attributes": {}}


def content_hash(rows: Dataset) -> str:
    """The same for equal rows and no others, wherever and however a data set keeps them."""
    found, arrow = hashlib.sha256(), rows.with_format("arrow")
    for start in range(0, len(rows), 1000):
        for row in arrow[start : start + 1000].to_pylist():
            found.update(json.dumps(row, sort_keys=True, default=repr).encode() + b"\n")
    return found.hexdigest()[:16]


def stage_settings(
    args: Any, model: Any, four_bit: FourBitConfig | None, peft_config: Any, data: Mapping[str, str]
) -> dict[str, Any]:
    """What defines a stage, as JSON: two runs of the same data and settings learn the same.

    Args:
        args: the stage's.
        model: the target.
        four_bit: how it is converted.
        peft_config: of the adapter.
        data: `content_hash` of each part.
    """
    found = {name: getattr(args, name) for name in DEFINING if hasattr(args, name)}
    found["sequences of a step"] = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    found["model"] = [type(model).__name__, sum(parameter.numel() for parameter in model.parameters())]
    found["four_bit"] = None if four_bit is None else four_bit.to_dict()
    found["peft_config"] = None if peft_config is None else peft_config.to_dict()
    found["data set"] = dict(data)
    return json.loads(json.dumps(found, default=lambda value: sorted(value) if isinstance(value, set) else str(value)))


def begin_stage(folder: Path, settings: Mapping[str, Any], resume: bool) -> str | None:
    """The run to go on with in a stage's folder, or a new one, before which nothing in the folder counts.

    All processes call it, and those that follow it see the folder as it leaves it.

    Args:
        folder: the stage's.
        settings: its `stage_settings`.
        resume: whether to go on with what lies there.

    Returns:
        The run's name; None for one that an older version began, of which the checkpoints do not say whose they are.

    Raises:
        ValueError: the run that lies there had other settings.
    """
    file = folder / RUN_FILE
    old = json.loads(file.read_text(encoding="utf-8")) if resume and file.exists() else None
    PartialState().wait_for_everyone()  # before one of them writes
    if old is not None:
        check_settings(folder, old["settings"], settings)
        return old["run"]
    if resume and ((folder / FINISHED).exists() or last_complete_checkpoint(folder)):
        return None
    with shared_errors(all_processes()):
        if PartialState().is_main_process:
            (folder / FINISHED).unlink(missing_ok=True)
            with atomic_file(file) as path:
                content = {"run": uuid.uuid4().hex, "settings": settings}
                path.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
    return json.loads(file.read_text(encoding="utf-8"))["run"]


def check_settings(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise where a run would be gone on with under other settings.

    Raises:
        ValueError: with all that differ.
    """
    differing = [name for name in new if name in old and _differ(name, old[name], new[name])]
    if differing:
        values = "; ".join(f"{name} was {old[name]!r} and is {new[name]!r}" for name in differing)
        raise ValueError(
            f"resume=True must go on with the settings of the run in {folder}, of which others are given: {values};"
            " give those, or another output_dir, or resume=False"
        )


def _differ(name: str, old: Any, new: Any) -> bool:
    """Of a configuration the fields that both versions of its library have, and not which version it was."""
    if name not in ("peft_config", "four_bit") or not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return bool(old != new)
    return any(old[field] != new[field] for field in (old.keys() & new.keys()) - {"peft_version"})


def own_checkpoint(folder: str, run: str | None) -> str | None:
    """The newest complete checkpoint of a run, passing over those of others in the same folder."""
    found = last_complete_checkpoint(folder)
    while found is not None and run is not None:
        state = json.loads(Path(found, FINISHED).read_text(encoding="utf-8"))
        kept = state.get("stateful_callbacks", {}).get(StageRun.__name__, {})
        if kept.get("args", {}).get("run") == run:
            return found
        logger.warning("checkpoint %s is of another run and is passed over", found)
        step = int(found.rsplit("-", 1)[1])
        found = last_complete_checkpoint(folder, before=step) if step >= 1 else None
    return found
