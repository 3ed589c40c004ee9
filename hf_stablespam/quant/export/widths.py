"""How wide each layer of a model is: pruned models have layers of unequal widths, which no config of transformers says.

The config of such a model has a note of its widths. Beside the weights they go into ``pruning.json``, and
``config.json`` gets a text in the place of the number that there is none of, and of the model's type: whoever reads
these stops with the text, before any weight is loaded or, with ``ignore_mismatched_sizes=True``, made anew without a
word. The type is what `AutoTokenizer` does without, so that it still finds the tokenizer of the folder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

CONFIG_KEY = "pruned_layers"  # of the note: ``intermediate_size`` and ``kv_heads`` of each layer
FILE = "pruning.json"
_CONFIG_FILE = "config.json"
_FIELDS = {"intermediate_size": ("intermediate_size",), "kv_heads": ("num_key_value_heads", "num_attention_heads")}
_REMEDY = "load it with hf_stablespam.recipes.adapt_pruner.load_pruned"
_MESSAGE = f"does not say how wide the layers of this pruned model are: {_REMEDY}"

# Weight of a layer → the dimension that says its width.
_WEIGHTS = {"mlp.down_proj": 1, "self_attn.q_proj": 0, "self_attn.k_proj": 0}
_NAME = re.compile(rf"layers\.(\d+)\.({'|'.join(map(re.escape, _WEIGHTS))})\.weight$")

Width = int | list[int]  # of all layers, or one each where they differ


class Widths(NamedTuple):
    """Neurons of the MLP, query heads and key-value heads."""

    feed_forward: Width
    heads: Width
    kv_heads: Width

    @property
    def unequal(self) -> bool:
        """Whether the layers differ."""
        return any(isinstance(width, list) for width in self)


def head_width(config: Any) -> int:
    """Numbers of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def layer_widths(model: Any) -> Widths:
    """The widths of the layers, read from the weights; from the config where a model fuses its projections."""
    config = model.config
    found: dict[str, dict[int, int]] = {name: {} for name in _WEIGHTS}
    for key, parameter in model.named_parameters():
        if match := _NAME.search(key):
            found[match[2]][int(match[1])] = parameter.shape[_WEIGHTS[match[2]]]
    heads, unit = config.num_attention_heads, head_width(config)
    return Widths(
        _one_or_each(found["mlp.down_proj"], config.intermediate_size),
        _one_or_each(found["self_attn.q_proj"], heads, unit),
        _one_or_each(found["self_attn.k_proj"], getattr(config, "num_key_value_heads", None) or heads, unit),
    )


def _one_or_each(by_layer: dict[int, int], configured: int, unit: int = 1) -> Width:
    widths: Sequence[int] = [by_layer[layer] // unit for layer in sorted(by_layer)] or [configured]
    return widths[0] if len(set(widths)) == 1 else list(widths)


def note_counts(module: Any, **counts: int) -> None:
    """Set those of the numbers that a module keeps beside its weights."""
    for name, count in counts.items():
        if isinstance(getattr(module, name, None), int):
            setattr(module, name, count)


def text_config(config: Any) -> Any:
    """The part of a config that has the sizes of the language model's layers."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def unequal(widths: Sequence[Mapping[str, int]]) -> list[str]:
    """Which of ``intermediate_size`` and ``kv_heads`` differ between the layers."""
    return [name for name in _FIELDS if len({width[name] for width in widths}) > 1]


def unsaid(config: Any, widths: Sequence[Mapping[str, int]]) -> list[str]:
    """Which of them the config has no number for: they differ, or, with a note, it has the number of before a cut."""
    found = unequal(widths)
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
    if "kv_heads" not in found and hasattr(config, CONFIG_KEY) and widths[0]["kv_heads"] != heads:
        found.append("kv_heads")
    return found


def write_widths(config: Any, directory: Path, widths: Sequence[Mapping[str, int]] | None = None) -> None:
    """Put ``pruning.json`` beside a model that has been saved, and the text into its ``config.json``.

    Args:
        config: of the model; without a note of its widths, and without `widths`, nothing is written.
        directory: where it was saved.
        widths: of the layers; default: those of the note.
    """
    config = text_config(config)
    widths = widths or getattr(config, CONFIG_KEY, None)
    if not widths:
        return
    path = directory / _CONFIG_FILE
    options = json.loads(path.read_text())
    part, numbers, model_type = text_part(options), {}, options["model_type"]
    for width in unsaid(config, widths):
        for name in _FIELDS[width]:
            numbers[name] = getattr(config, name)
            part[name] = _MESSAGE
    if numbers:
        options["model_type"] = f"{model_type}, pruned: {_REMEDY}"
    path.write_text(json.dumps(options, indent=2, sort_keys=True) + "\n")
    saved = {"layers": list(widths), "config": numbers, "model_type": model_type}
    (directory / FILE).write_text(json.dumps(saved, indent=1) + "\n")


def has_widths(directory: Path) -> bool:
    """Whether a model was saved there whose layers' widths are noted: beside it, or only in its config."""
    path = directory / _CONFIG_FILE
    noted = path.is_file() and CONFIG_KEY in text_part(json.loads(path.read_text()))
    return noted or (directory / FILE).is_file()


def read_widths(directory: Path) -> tuple[list[dict[str, int]], dict[str, Any]]:
    """The widths of the layers, and the config with its numbers back in their places.

    Args:
        directory: with ``pruning.json``, or as plain ``save_pretrained`` leaves it, with the note in the config only.
    """
    options = json.loads((directory / _CONFIG_FILE).read_text())
    if not (directory / FILE).is_file():
        return text_part(options)[CONFIG_KEY], options
    saved = json.loads((directory / FILE).read_text())
    text_part(options).update(saved["config"])
    options["model_type"] = saved.get("model_type", options["model_type"])  # the first files had none
    return saved["layers"], options


def text_part(options: dict[str, Any]) -> dict[str, Any]:
    """The dictionary of a saved config that has the language model's sizes."""
    nested = options.get("text_config")
    return nested if isinstance(nested, dict) and "intermediate_size" in nested else options
