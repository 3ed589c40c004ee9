"""A checkpoint of the Trainer → a packed 4-bit checkpoint."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from hf_stablespam.quant import FourBitConfig, convert_to_4bit, export_4bit
from hf_stablespam.quant.convert import CONFIG_KEY

TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")


def export_checkpoint(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    config: FourBitConfig | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    leave_unpackable: bool = False,
) -> None:
    """Pack the weights of a checkpoint that was trained in 4 bits.

    How it was trained stands in the checkpoint's ``config.json``, where `convert_to_4bit` leaves a note. The weights
    there are ordinary high-precision ones; packing puts them on the grid that training used.

    Args:
        checkpoint: folder written by the Trainer or by `save_pretrained`.
        output: folder to write to; another than `checkpoint`.
        config: formats and which layers, instead of those noted in the checkpoint.
        dtype: see `export_4bit`.
        leave_unpackable: see `export_4bit`.

    Raises:
        FileNotFoundError: the folder has no ``config.json``.
        ValueError: the checkpoint has no note and no `config` was given, or `export_4bit` refuses the model.

    Example:
        >>> export_checkpoint("runs/llama/checkpoint-500", "llama-4bit")  # doctest: +SKIP
    """
    folder, target = Path(checkpoint), Path(output)
    if folder.resolve() == target.resolve():
        raise ValueError(f"output must be another folder than the checkpoint, got {str(target)!r} for both")
    written = _read_config(folder)
    config = config or noted_config(folder)
    model = _model_class(written, folder).from_pretrained(folder, dtype=torch.float32)
    model = model.to(getattr(torch, written.get("dtype") or written.get("torch_dtype") or "float32"))
    tokenizer: Any = None
    if any((folder / name).exists() for name in TOKENIZER_FILES):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    convert_to_4bit(model, config)
    export_4bit(model, target, tokenizer, dtype=dtype, leave_unpackable=leave_unpackable)


def noted_config(checkpoint: str | os.PathLike[str]) -> FourBitConfig:
    """The configuration that a checkpoint was trained with.

    Raises:
        FileNotFoundError: the folder has no ``config.json``.
        ValueError: the checkpoint was not trained in 4 bits.
    """
    note = _read_config(Path(checkpoint)).get(CONFIG_KEY)
    if note is None:
        raise ValueError(
            f"{checkpoint} was not trained in 4 bits: its config.json has no {CONFIG_KEY!r}; train with"
            " FourBitCallback, or give the format to round the weights to (--weight int4)"
        )
    return FourBitConfig.from_dict(note)


def export_with(
    checkpoint: str, output: str, changes: dict[str, Any], dtype: str = "bfloat16", leave_unpackable: bool = False
) -> None:
    """`export_checkpoint` with some options of the noted configuration changed: what the command line says.

    Args:
        checkpoint: see `export_checkpoint`.
        output: see `export_checkpoint`.
        changes: fields of `FourBitConfig`; a checkpoint that was not trained in 4 bits is rounded to what they say.
        dtype: name of a dtype of torch.
        leave_unpackable: see `export_4bit`.
    """
    config = None
    if changes:
        has_note = CONFIG_KEY in _read_config(Path(checkpoint))
        config = replace(noted_config(checkpoint) if has_note else FourBitConfig(activation=None), **changes)
    export_checkpoint(checkpoint, output, config, dtype=getattr(torch, dtype), leave_unpackable=leave_unpackable)


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
    return json.loads(path.read_text())


def _model_class(written: dict[str, Any], folder: Path) -> Any:
    """The class that the checkpoint's config names."""
    if "quantization_config" in written:
        raise ValueError(f"{folder} is quantized already; give the checkpoint that the Trainer wrote")
    names = written.get("architectures") or ["none"]
    if not hasattr(transformers, names[0]):
        raise ValueError(
            f"architectures in {folder}/config.json must name a class of transformers, got {names[0]!r}; load the model"
            " yourself and call export_4bit"
        )
    return getattr(transformers, names[0])
