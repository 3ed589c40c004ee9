"""A pruned model on disk: transformers' own files, and pruning.json with the width of every layer."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from hf_stablespam.quant.export.widths import FILE, read_widths, write_widths
from hf_stablespam.recipes.adapt_pruner.model.layers import find_layers
from hf_stablespam.recipes.adapt_pruner.model.optimizer_state import OptimizerSurgeon
from hf_stablespam.recipes.adapt_pruner.model.surgery import checked, cut_layers
from hf_stablespam.recipes.adapt_pruner.model.widths import note_widths, widths_of
from hf_stablespam.recipes.adapt_pruner.plan import LayerPlan, PruningPlan


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
        FileNotFoundError: there is no ``pruning.json``.
        ValueError: the widths are not those of such a model, a class that transformers does not have, or
            ``ignore_mismatched_sizes=True``.

    Example:
        >>> model = load_pruned("small", dtype=torch.bfloat16)  # doctest: +SKIP
    """
    folder = Path(directory)
    if kwargs.get("ignore_mismatched_sizes"):
        raise ValueError("ignore_mismatched_sizes=True would make weights anew that do not fit; leave it out")
    if not (folder / FILE).is_file():
        raise FileNotFoundError(
            f"{folder} has no {FILE}, so it is no folder of save_pruned; load it with from_pretrained"
        )
    widths, options = read_widths(folder)
    names = options.get("architectures") or [None]
    base = getattr(transformers, names[0] or "", None)
    if base is None:
        raise ValueError(f"architectures in the config.json of {folder} must name a class of transformers, got {names}")
    config = kwargs.pop("config", None) or transformers.AutoConfig.for_model(**options)
    model = _sized(base, widths).from_pretrained(folder, config=config, **kwargs)
    model.__class__ = base
    return model


def write_widths_of(model: Any, directory: str | os.PathLike[str]) -> None:
    """Put pruning.json beside a model that has been saved."""
    write_widths(model.config, Path(directory), widths_of(find_layers(model)))


def _sized(base: Any, widths: Sequence[Mapping[str, int]]) -> Any:
    """A subclass whose models are born with these widths, before anybody loads weights into them."""

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        shrink(self, widths)

    return type(base.__name__, (base,), {"__init__": __init__, "__module__": base.__module__})


def shrink(model: nn.Module, widths: Sequence[Mapping[str, int]]) -> None:
    """Cut a model whose weights do not matter to these widths.

    Args:
        model: as its config builds it.
        widths: ``intermediate_size`` and ``kv_heads`` of every layer.

    Raises:
        ValueError: they do not fit the model.
    """
    layers = find_layers(model)
    plan = PruningPlan(
        [LayerPlan(tuple(range(width["intermediate_size"])), tuple(range(width["kv_heads"]))) for width in widths]
    )
    cut_layers(layers, checked(plan, layers), OptimizerSurgeon(None))
    note_widths(model, layers)
