"""A pruned model on disk: transformers' own files, and pruning.json with the width of every layer."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import transformers

from hf_stablespam.quant.export.widths import FILE, has_widths, write_widths
from hf_stablespam.recipes.adapt_pruner.model.layers import find_layers
from hf_stablespam.recipes.adapt_pruner.model.widths import widths_of
from hf_stablespam.trainer.pruned_checkpoint import load_widths


def save_pruned(
    model: Any, directory: str | os.PathLike[str], processing_class: Any = None, *, is_main_process: bool = True
) -> None:
    """Save a pruned model: what ``save_pretrained`` writes, and ``pruning.json`` with the width of every layer.

    `load_pruned` reads the folder, and one that `export_4bit` has written of such a model. Where all layers are alike,
    so does plain ``from_pretrained``. Where they are not, no config of transformers can say so, and ``from_pretrained``
    would fail late, or with ``ignore_mismatched_sizes=True`` make the weights anew without a word; the config of the
    folder therefore has a text in the place of the number, and every ``from_pretrained`` stops at it with an error that
    names `load_pruned`.

    Args:
        model: a transformers model, pruned or not, in 4-bit training or not (the master weights are saved).
        directory: where to write.
        processing_class: tokenizer or processor to save beside it; `None` saves none.
        is_main_process: False on the other processes of a distributed run, which write nothing.

    Raises:
        TypeError: no decoder layers of Llama's shape.

    Example:
        >>> save_pruned(model, "small", tokenizer)  # doctest: +SKIP
        >>> model = load_pruned("small")  # doctest: +SKIP
    """
    find_layers(model)
    model.save_pretrained(directory, is_main_process=is_main_process)
    if is_main_process:
        write_widths_of(model, directory)
        if processing_class is not None:
            processing_class.save_pretrained(directory)


def load_pruned(directory: str | os.PathLike[str], **kwargs: Any) -> Any:
    """Load a model that `save_pruned`, `export_4bit`, or a Trainer with `AdaptPruneCallback` has saved.

    Args:
        directory: the folder.
        kwargs: of ``from_pretrained``: ``dtype``, ``device_map``, ``attn_implementation``, ``quantization_config`` ….

    Returns:
        A model of the class that was saved.

    Raises:
        FileNotFoundError: there is no ``pruning.json``, and no note in the config either.
        ValueError: the widths are not those of such a model, a class that transformers does not have, or
            ``ignore_mismatched_sizes=True``.

    Example:
        >>> model = load_pruned("small", dtype=torch.bfloat16)  # doctest: +SKIP
    """
    folder = Path(directory)
    if kwargs.get("ignore_mismatched_sizes"):
        raise ValueError("ignore_mismatched_sizes=True would make weights anew that do not fit; leave it out")
    if not has_widths(folder):
        raise FileNotFoundError(
            f"{folder} has no {FILE}, so it is no folder of save_pruned; load it with from_pretrained"
        )
    names = json.loads((folder / "config.json").read_text()).get("architectures") or [None]
    base = getattr(transformers, names[0] or "", None)
    if base is None:
        raise ValueError(f"architectures in the config.json of {folder} must name a class of transformers, got {names}")
    return load_widths(base, folder, **kwargs)


def write_widths_of(model: Any, directory: str | os.PathLike[str]) -> None:
    """Put pruning.json beside a model that has been saved."""
    write_widths(model.config, Path(directory), widths_of(find_layers(model)))
