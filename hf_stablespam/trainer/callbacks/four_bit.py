"""Train in 4 bits: a callback that converts the Trainer's model."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import GenerationMixin, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_stablespam._shared_errors import all_processes, shared_errors
from hf_stablespam.quant import FourBitConfig, convert_to_4bit, export_4bit, export_gguf, fixed_weights
from hf_stablespam.quant.convert import configuration_of
from hf_stablespam.quant.export.checks import check_packable
from hf_stablespam.quant.export.gguf.checks import check_gguf
from hf_stablespam.trainer.callbacks.helpers.run_folder import learn_run_folders, run_folder
from hf_stablespam.trainer.callbacks.helpers.uncalled_layers import refuse_uncalled_layers
from hf_stablespam.trainer.patching import patch
from hf_stablespam.trainer.reference_model import convert_references


class FourBitCallback(TrainerCallback):
    """Converts the model's linear layers to 4 bits before the optimizer is made.

    With `model_init` the Trainer builds the model anew when training begins, and it is converted again then. Converting
    a converted model does nothing. TRL's reference model is converted as the model is.

    Args:
        config: formats and which layers; default `FourBitConfig()`, or what the model was loaded with
            (``from_pretrained(…, quantization_config=FourBitConfig(…))``).
        export: write a packed 4-bit checkpoint when training ends: True for the folder ``4bit`` in `output_dir`, or
            the folder to write to; ``"gguf"`` for the file ``model.gguf`` in `output_dir`, or a file that ends in
            ``.gguf``. What cannot be packed is an error before training. What an earlier run wrote is replaced; each
            trial of a hyperparameter search has an `output_dir` of its own.
        leave_unpackable: with `export` to a folder: store layers whose rows the group does not divide unpacked instead
            of raising.

    Raises:
        TypeError: `config` is something else.
        ValueError: `leave_unpackable` without such an `export`; from `convert_to_4bit`, for example when the model has
            no linear layer; before the first update, 4-bit layers that the model never calls.

    Example:
        >>> callback = FourBitCallback(FourBitConfig(weight="int4", activation=None))
        >>> callback.config.weight
        'int4'
    """

    def __init__(
        self,
        config: FourBitConfig | None = None,
        *,
        export: bool | str | os.PathLike[str] = False,
        leave_unpackable: bool = False,
    ) -> None:
        if config is not None and not isinstance(config, FourBitConfig):
            raise TypeError(f"config must be a FourBitConfig, got {type(config).__name__}; use FourBitConfig(...)")
        if leave_unpackable and (not export or _is_gguf(export)):
            raise ValueError(
                f"leave_unpackable=True needs export to be True or a folder, got export={export!r}: it says how a"
                " packed checkpoint is written; set export, or leave leave_unpackable out"
            )
        self.config = config or FourBitConfig()
        self._is_default = config is None
        self.export = export
        self.leave_unpackable = leave_unpackable
        self._calls_are_checked = False
        self._packable: weakref.ref[Any] | None = None  # the model that was found to be so, while it lives
        patch(GenerationMixin, "generate", _with_fixed_weights)  # for GRPO and sequence to sequence
        convert_references()
        learn_run_folders()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packable": None}  # a weak reference cannot be pickled, as Ray does

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **others: Any
    ) -> None:
        if model is not None:
            self._convert(model)
            self._check_export(model, others.get("processing_class"))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **others: Any
    ) -> None:
        self._convert(model)
        self._check_export(model, others.get("processing_class"))
        self._calls_are_checked = False

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **others: Any
    ) -> None:
        if not self._calls_are_checked:
            self._calls_are_checked = True
            refuse_uncalled_layers(model, args)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        processing_class: Any = None,
        **others: Any,
    ) -> None:
        if not self.export:
            return
        with shared_errors(all_processes()):  # DDP's too, of which only one writes
            self._export(model, args, processing_class, state)

    def _export(self, model: Any, args: TrainingArguments, processing_class: Any, state: TrainerState) -> None:
        main = state.is_world_process_zero
        if file := self._gguf_file(args, state):
            export_gguf(model, file, processing_class, overwrite=True, is_main_process=main)
            return
        assert self.export  # as on_train_end knows
        directory = run_folder(args, state) / "4bit" if self.export is True else Path(self.export)
        export_4bit(model, directory, processing_class, leave_unpackable=self.leave_unpackable, is_main_process=main)

    def _convert(self, model: Any) -> None:
        """Convert; a model that came converted keeps its configuration, unless the callback was given one."""
        if self._is_default:  # and not what another Trainer's model came with
            self.config = configuration_of(model) or FourBitConfig()
        convert_to_4bit(model, self.config)

    def _check_export(self, model: Any, processing_class: Any) -> None:
        """Raise about what could not be exported: for each model once, whenever the callback first meets it."""
        if not self.export or (self._packable is not None and self._packable() is model):
            return
        if _is_gguf(self.export):
            check_gguf(model, processing_class)
        else:
            check_packable(model, leave_unpackable=self.leave_unpackable)
        self._packable = weakref.ref(model)

    def _gguf_file(self, args: TrainingArguments, state: TrainerState) -> Path | None:
        """The GGUF file to write, if `export` asks for one."""
        if not _is_gguf(self.export):
            return None
        return run_folder(args, state) / "model.gguf" if self.export == "gguf" else Path(str(self.export))


def _is_gguf(export: bool | str | os.PathLike[str]) -> bool:
    return not isinstance(export, bool) and (export == "gguf" or Path(export).suffix == ".gguf")


def _with_fixed_weights(generate: Callable[..., Any]) -> Callable[..., Any]:
    """`generate`, rounding the 4-bit weights once instead of for every token."""

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        with fixed_weights(self):
            return generate(self, *args, **kwargs)

    return wrapped
