"""A checkpoint of the Trainer → a file or folder for the engine that is to run it."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from hf_stablespam.quant import FourBitConfig, convert_to_4bit, export_4bit, export_gguf, restore_linear
from hf_stablespam.quant.convert import CONFIG_KEY
from hf_stablespam.quant.export import export_unpacked
from hf_stablespam.quant.export.widths import has_widths
from hf_stablespam.trainer.checkpoints import last_checkpoint_with_weights
from hf_stablespam.trainer.pruned_checkpoint import load_widths
from hf_stablespam.trainer.registration.quantization_config import QUANT_METHOD

logger = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")
TARGETS = ("compressed-tensors", "gguf", "unpacked")


def export_checkpoint(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    config: FourBitConfig | None = None,
    *,
    to: str = "compressed-tensors",
    dtype: torch.dtype = torch.bfloat16,
    leave_unpackable: bool = False,
    embedding: str = "q8_0",
    overwrite: bool = False,
) -> None:
    """Write the weights of a checkpoint that was trained in 4 bits in the format of an engine.

    How it was trained stands in the checkpoint's ``config.json``, where `convert_to_4bit` leaves a note. The weights
    there are ordinary high-precision ones; packing puts them on the grid that training used.

    Args:
        checkpoint: folder written by the Trainer or by `save_pretrained`; of a run's output folder without a model of
            its own, the last checkpoint.
        output: folder to write to, another than the one that is read; for ``"gguf"`` a file, and none of the
            checkpoint's own.
        config: formats and which layers, instead of those noted in the checkpoint.
        to: ``"compressed-tensors"`` (see `export_4bit`), ``"gguf"`` (see `export_gguf`) or ``"unpacked"``: an ordinary
            checkpoint that holds the 4-bit numbers in float32, for other converters.
        dtype: for ``"compressed-tensors"``, see `export_4bit`.
        leave_unpackable: likewise.
        embedding: for ``"gguf"``, see `export_gguf`.
        overwrite: likewise.

    Raises:
        FileNotFoundError: the folder has no ``config.json``.
        ValueError: `output` is what is read, the checkpoint has no note and no `config` was given, is cut short or
            lacks weights, or the model is refused by what writes it.

    Example:
        >>> export_checkpoint("runs/llama/checkpoint-500", "llama-4bit")  # doctest: +SKIP
        >>> export_checkpoint("runs/llama/checkpoint-500", "llama.gguf", to="gguf")  # doctest: +SKIP
    """
    if to not in TARGETS:
        raise ValueError(f"to must be one of {', '.join(map(repr, TARGETS))}, got {to!r}")
    refuse_replacing(checkpoint, output)
    model, tokenizer = load_trained(checkpoint, config)
    if to == "gguf":
        export_gguf(model, output, tokenizer, embedding=embedding, overwrite=overwrite)
    elif to == "unpacked":
        export_unpacked(model, output, tokenizer)
    else:
        export_4bit(model, output, tokenizer, dtype=dtype, leave_unpackable=leave_unpackable)


def refuse_replacing(checkpoint: str | os.PathLike[str], output: str | os.PathLike[str]) -> None:
    """Raise where writing to `output` would replace what a checkpoint consists of.

    Args:
        checkpoint: the folder to read, or a run's, of which the last checkpoint is read.
        output: the folder or file to write.

    Raises:
        ValueError: it is that folder, or a file in it that is there and no GGUF file.
    """
    read, written = _checkpoint_of(Path(checkpoint)).resolve(), Path(output).resolve()
    if written == Path(checkpoint).resolve():
        raise ValueError(f"output must be another folder than the checkpoint, got {str(output)!r} for both")
    if written == read:
        raise ValueError(
            f"output must be another folder than the checkpoint, got {str(output)!r}, the last one of {checkpoint},"
            " whose weights would be lost; give a new folder"
        )
    if written.is_file() and written.suffix != ".gguf" and written.parent == read:
        raise ValueError(
            f"output must be no file of the checkpoint, got {str(output)!r}, which would be lost; give a file that ends"
            " in .gguf, or one in another folder"
        )


def load_trained(checkpoint: str | os.PathLike[str], config: FourBitConfig | None = None) -> tuple[Any, Any]:
    """The model of a checkpoint with its 4-bit layers, and its tokenizer or None.

    Args:
        checkpoint: folder written by the Trainer or by `save_pretrained`.
        config: instead of the one noted there; a checkpoint that has none is rounded now, which a warning says.

    Raises:
        FileNotFoundError: the folder has no ``config.json``.
        ValueError: neither a note nor a `config`.
    """
    folder = _checkpoint_of(Path(checkpoint))
    written = _read_config(folder)
    if config is not None and CONFIG_KEY not in written:
        logger.warning(
            "%s was not trained in 4 bits: its weights are rounded to %s now, which costs accuracy that training in 4"
            " bits would have kept",
            *(folder, config.weight),
        )
    config = config or noted_config(folder)
    model = _load_whole(_model_class(written, folder), folder)
    model = model.to(getattr(torch, written.get("dtype") or written.get("torch_dtype") or "float32"))
    tokenizer: Any = None
    if any((folder / name).exists() for name in TOKENIZER_FILES):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, config=model.config)
    return convert_to_4bit(restore_linear(model), config), tokenizer


def _load_whole(model_class: Any, folder: Path) -> Any:
    """The model of a checkpoint that has all of its weights.

    Raises:
        ValueError: a file is cut short, or a weight is missing: transformers would make it anew, and say so in passing.
    """
    try:
        options = {"dtype": torch.float32, "output_loading_info": True}
        if has_widths(folder):
            model, found = load_widths(model_class, folder, **options)
        else:
            model, found = model_class.from_pretrained(folder, **options)
    except (SafetensorError, EOFError, UnpicklingError) as error:
        raise ValueError(
            f"the weights in {folder} cannot be read: {error}; they are cut short or damaged: export an earlier"
            " checkpoint (last_complete_checkpoint finds the newest that is whole)"
        ) from error
    if missing := sorted(found["missing_keys"]):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"{folder} lacks weights of {model_class.__name__}: {', '.join(missing[:3])}{more}; they would be random"
            " numbers: export a checkpoint that has all of them"
        )
    return model


def noted_config(checkpoint: str | os.PathLike[str]) -> FourBitConfig:
    """The configuration that a checkpoint was trained with.

    Raises:
        FileNotFoundError: the folder has no ``config.json``.
        ValueError: the checkpoint was not trained in 4 bits.
    """
    note = _read_config(_checkpoint_of(Path(checkpoint))).get(CONFIG_KEY)
    if note is None:
        raise ValueError(
            f"{checkpoint} was not trained in 4 bits: its config.json has no {CONFIG_KEY!r}; train with"
            " FourBitCallback, or give the format to round the weights to (--weight int4)"
        )
    return FourBitConfig.from_dict(note)


def export_with(checkpoint: str, output: str, changes: dict[str, Any], dtype: str = "bfloat16", **options: Any) -> None:
    """`export_checkpoint` with some options of the noted configuration changed: what the command line says.

    Args:
        checkpoint: see `export_checkpoint`.
        output: see `export_checkpoint`.
        changes: fields of `FourBitConfig`; a checkpoint that was not trained in 4 bits is rounded to what they say.
        dtype: name of a dtype of torch.
        options: the others of `export_checkpoint`.
    """
    config = None
    if changes:
        has_note = CONFIG_KEY in _read_config(_checkpoint_of(Path(checkpoint)))
        config = replace(noted_config(checkpoint) if has_note else FourBitConfig(activation=None), **changes)
    export_checkpoint(checkpoint, output, config, dtype=getattr(torch, dtype), **options)


def _checkpoint_of(folder: Path) -> Path:
    """`folder`, or the last checkpoint in it where it holds no model itself."""
    if any((folder / name).exists() for name in ("config.json", "adapter_config.json")) or not folder.is_dir():
        return folder
    return Path(last_checkpoint_with_weights(folder) or folder)


def _read_config(folder: Path) -> dict[str, Any]:
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder} holds a PEFT adapter, which cannot be packed by itself; load it on its base model, merge it with"
            " merge_and_unload(), save the result, and export that"
        )
    path = folder / "config.json"
    if not path.exists():
        missing = "" if folder.exists() else f" ({folder} does not exist)"
        raise FileNotFoundError(
            f"{folder} has no config.json; give a folder that the Trainer or save_pretrained wrote{missing}"
        )
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}; it is cut short: export an earlier checkpoint") from error


def _model_class(written: dict[str, Any], folder: Path) -> Any:
    """The class that the checkpoint's config names."""
    if written.get("quantization_config", {}).get("quant_method", QUANT_METHOD) != QUANT_METHOD:
        raise ValueError(f"{folder} is quantized already; give the checkpoint that the Trainer wrote")
    names = written.get("architectures") or ["none"]
    if not hasattr(transformers, names[0]):
        raise ValueError(
            f"architectures in {folder}/config.json must name a class of transformers, got {names[0]!r}; load the model"
            " yourself and call export_4bit"
        )
    return getattr(transformers, names[0])
