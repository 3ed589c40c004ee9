"""`train_target`: SFT on the best answers, then DPO on the pairs, in full precision or in 4 bits."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.utils import logging

from hf_stablespam._sharded import is_sharded
from hf_stablespam._shared_errors import all_processes, shared_errors
from hf_stablespam.quant import FourBitConfig, convert_to_4bit, export_4bit
from hf_stablespam.quant.export.checks import check_packable
from hf_stablespam.quant.export.state import whole_state_dict
from hf_stablespam.recipes.fusechat.reference import ChecksReference
from hf_stablespam.recipes.fusechat.report import TABLES_FILE, fusion_report, report_tables, write_report_tables
from hf_stablespam.recipes.fusechat.settings import NEEDED
from hf_stablespam.recipes.fusechat.stage_run import (
    FINISHED,
    StageRun,
    begin_stage,
    content_hash,
    own_checkpoint,
    stage_settings,
)

if TYPE_CHECKING:
    from trl import DPOConfig, SFTConfig

logger = logging.get_logger(__name__)

SMALL_RATE = 1e-4  # below it a step of Adam is less than half a unit of most bfloat16 weights


def train_target(
    model: Any,
    processing_class: Any,
    dataset: Mapping[str, Dataset],
    sft_args: SFTConfig,
    dpo_args: DPOConfig,
    *,
    eval_dataset: Mapping[str, Dataset] | None = None,
    four_bit: FourBitConfig | None = None,
    peft_config: Any = None,
    callbacks: Sequence[TrainerCallback] = (),
    export: bool | str | os.PathLike[str] = False,
    leave_unpackable: bool = False,
    resume: bool = False,
) -> nn.Module:
    """Train one model on the answers of many: `trl.SFTTrainer` on the best, then `trl.DPOTrainer` on the pairs.

    The SFT model is written to ``sft_args.output_dir``; from there DPO loads the policy and its reference π_ref, both
    converted to 4 bits alike if `four_bit` is given. Before the first step the DPO loss must be ln 2, because both
    are the same function then; it is measured on a few rows, and anything else is an error. A part without rows is
    passed over. Each stage's folder gets the tables of `fusion_report`, which
    ``hf-stablespam report`` shows.

    Args:
        model: the target, a model of transformers or the name or folder to load it from.
        processing_class: its tokenizer; with a chat template where the prompts are lists of messages.
        dataset: what `build_preference_dataset` returned. With several processes let the main one build it and
            `save_to_disk`, and all load it.
        sft_args: of the first stage; `paper_settings` makes both.
        dpo_args: of the second.
        eval_dataset: the same two parts of held-out prompts, for the ``eval_strategy`` of the arguments.
        four_bit: train both stages with 4-bit linear layers.
        peft_config: train an adapter in each stage; it is merged at each stage's end, and DPO's reference is the
            model without it.
        callbacks: for both stages, a copy for each.
        export: write a packed 4-bit checkpoint at the end: True for the folder ``4bit`` in ``dpo_args.output_dir``
            (without pairs in ``sft_args.output_dir``),
            or another folder. Needs `four_bit`; what cannot be packed is an error before training.
        leave_unpackable: see `export_4bit`.
        resume: go on with the last run in these folders, which was killed: a stage that has ended is passed over,
            another goes on from its last complete checkpoint. With False both stages begin anew: what earlier runs have
            left there counts no more, and is gone on with by no later ``resume=True``.

    Returns:
        The trained model, adapters merged; it lies in ``dpo_args.output_dir`` too (without pairs in
        ``sft_args.output_dir``).

    Raises:
        ValueError: arguments that exclude each other, a first loss that is not ln 2, nothing to train on, a run of
            other data or other settings to go on with, or a model that cannot be converted or packed.
        ImportError: TRL is not installed.

    Example:
        >>> sft_args, dpo_args = paper_settings("fused", "Llama-3.2-1B")  # doctest: +SKIP
        >>> train_target("meta-llama/Llama-3.2-1B-Instruct", tokenizer, data, sft_args, dpo_args)  # doctest: +SKIP
    """
    try:
        from trl import DPOTrainer, SFTTrainer
    except ImportError as error:
        raise ImportError(NEEDED) from error
    _check(model, dataset, sft_args, dpo_args, four_bit, export)
    model = AutoModelForCausalLM.from_pretrained(model) if isinstance(model, (str, os.PathLike)) else model
    if hasattr(model, "peft_config"):
        raise ValueError("model must have no adapter; merge it (merge_and_unload) and give peft_config instead")
    if four_bit is not None:
        convert_to_4bit(model, four_bit)
        if export:
            check_packable(model, leave_unpackable=leave_unpackable)
    report, evaluation = fusion_report(dataset), eval_dataset or {}
    folder, last = Path(str(sft_args.output_dir)), Path(str(dpo_args.output_dir))
    data = {part: content_hash(dataset[part]) for part in ("sft", "dpo")}

    def settings(args: Any) -> dict[str, Any]:
        return stage_settings(args, model, four_bit, peft_config, data)

    def train(trainer_class: Any, part: str, policy: Any, args: Any, run: str | None, **more: Any) -> None:
        rows = {"train_dataset": dataset[part], "eval_dataset": evaluation.get(part)}
        # PEFT writes into the configuration what it has found in the model.
        shared = {"processing_class": processing_class, "peft_config": copy.deepcopy(peft_config)}
        _warn_about_bfloat16(policy, args, peft_config)
        own = [*copy.deepcopy(list(callbacks)), *([] if run is None else [StageRun(run)])]
        _run(trainer_class(policy, args=args, callbacks=own, **rows, **shared, **more), run, resume)

    _check_data(folder, report, resume)
    sft_run = begin_stage(folder, settings(sft_args), resume)
    sft_ended = resume and (folder / FINISHED).exists()
    dpo_run = None
    if len(dataset["dpo"]):  # what a second stage has left is nothing to go on with while the first goes on
        goes_on = sft_ended or (resume and not len(dataset["sft"]))
        _check_data(last, report, goes_on)
        dpo_run = begin_stage(last, settings(dpo_args), goes_on)
    if not sft_ended:
        _write_tables(report, folder)
        if len(dataset["sft"]):
            train(SFTTrainer, "sft", model, sft_args, sft_run)
        else:
            _save(model, processing_class, folder)
    if not len(dataset["dpo"]):
        last = folder
    elif not (last / FINISHED).exists():
        _write_tables(report, last)
        needs_none = peft_config is not None or (dpo_args.precompute_ref_log_probs and not dpo_args.fsdp)
        reference = None if needs_none else _loaded(folder, model, four_bit)
        train(DPOTrainer, "dpo", _loaded(folder, model, four_bit), dpo_args, dpo_run, ref_model=reference)
    trained = _loaded(last, model, four_bit)
    if export:
        packed, is_main = last / "4bit" if export is True else Path(export), PartialState().is_main_process
        with shared_errors(all_processes()):
            export_4bit(trained, packed, processing_class, leave_unpackable=leave_unpackable, is_main_process=is_main)
    return trained


def _write_tables(report: Mapping[str, Any], folder: Path) -> None:
    """For the HTML report, by one process."""
    with shared_errors(all_processes()):
        if PartialState().is_main_process:
            write_report_tables(report, folder)


def _run(trainer: Any, run: str | None, resume: bool) -> None:
    """Train and save the model, an adapter merged into it; the state comes last."""
    if hasattr(trainer, "ref_model"):
        trainer.add_callback(ChecksReference(trainer))
    folder = trainer.args.output_dir
    trainer.train(resume_from_checkpoint=own_checkpoint(folder, run) if resume else None)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "peft_config"):
        _save(model, trainer.processing_class, Path(folder))
    with shared_errors(all_processes()):  # a barrier too: what follows reads the folder
        if not hasattr(model, "peft_config"):
            trainer.save_model()
        trainer.save_state()


def _save(model: Any, processing_class: Any, folder: Path) -> None:
    """Write a model by one process, an adapter merged into it; shards of FSDP2 are gathered by all."""
    with shared_errors(all_processes()) as meet:
        model = model.merge_and_unload() if hasattr(model, "peft_config") else model
        tensors = None
        if any(is_sharded(parameter) for parameter in model.parameters()):
            meet()
            tensors = whole_state_dict(model, model.dtype)
        if PartialState().is_main_process:
            model.save_pretrained(folder, state_dict=tensors)
            processing_class.save_pretrained(folder)


def _loaded(folder: Path, like: Any, four_bit: FourBitConfig | None) -> Any:
    """The model in a folder, in the class and dtype of `like`, converted if `four_bit` says so.

    From the disk rather than a copy: what a Trainer has wrapped around a model does not survive `copy.deepcopy`.
    """
    attention = like.config._attn_implementation
    model = type(like).from_pretrained(folder, dtype=like.dtype, attn_implementation=attention)
    return model if four_bit is None else convert_to_4bit(model, four_bit)


def _check_data(folder: Path, report: Mapping[str, Any], resume: bool) -> None:
    """Raise where a run of data that gave other counts would be gone on with: all that older runs say of theirs.

    Raises:
        ValueError: it was one.
    """
    tables = folder / TABLES_FILE
    if resume and tables.exists() and json.loads(tables.read_text(encoding="utf-8"))["tables"] != report_tables(report):
        raise ValueError(
            f"resume=True must go on with the run in {folder}, which was trained on another data set (its {TABLES_FILE}"
            " differs); give another output_dir, or resume=False"
        )


def _warn_about_bfloat16(model: Any, args: Any, peft_config: Any) -> None:
    """Weights in 16 bits that such small steps do not move."""
    halves = {p.dtype for p in model.parameters() if p.requires_grad} & {torch.bfloat16, torch.float16}
    rounds = "stochastic_rounding" in str(args.optim_args or "")
    if halves and peft_config is None and not rounds and args.learning_rate < SMALL_RATE:
        logger.warning(
            "the weights are %s and the learning rate is %g: most updates are rounded away; load the model in float32"
            " (bf16=True still computes in bfloat16), or set optim_args='stochastic_rounding=True'",
            *(str(halves.pop()).removeprefix("torch."), args.learning_rate),
        )


def _check(
    model: Any,
    dataset: Mapping[str, Dataset],
    sft_args: SFTConfig,
    dpo_args: DPOConfig,
    four_bit: FourBitConfig | None,
    export: Any,
) -> None:
    if "sft" not in dataset or "dpo" not in dataset or not (len(dataset["sft"]) or len(dataset["dpo"])):
        rows = {part: len(dataset[part]) for part in dataset}
        raise ValueError(
            f"dataset must have the parts 'sft' and 'dpo' and a row in one of them, it has {rows};"
            " build_preference_dataset makes both"
        )
    folders = [Path(str(args.output_dir)).resolve() for args in (sft_args, dpo_args)]
    if folders[0] == folders[1]:
        raise ValueError(f"the stages must have folders of their own, got {str(sft_args.output_dir)!r} for both")
    source = model if isinstance(model, (str, os.PathLike)) else getattr(model, "name_or_path", "")
    if source and Path(source).resolve() in folders:
        raise ValueError(
            f"model must lie in another folder than those of the stages, got {str(source)!r}: the trained model would"
            " replace it; give a new output_dir"
        )
    if export and export is not True and Path(export).resolve() in folders:
        raise ValueError(
            f"export must be another folder than those of the stages, got {str(export)!r}: the packed model would"
            " replace the trained one; give a new folder, or True"
        )
    if export and four_bit is None:
        raise ValueError("export needs four_bit, which says how to pack; give the FourBitConfig to train with")
