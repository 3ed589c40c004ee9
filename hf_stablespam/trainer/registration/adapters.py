"""An adapter that PEFT puts over a 4-bit layer with ``adapters="merged"`` is one that merges without loss."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from hf_stablespam.trainer.patching import patch


def teach_lora(layer: ModuleType) -> None:
    """Let every `lora.Linear` look at what it is put over, when it is made."""
    patch(layer.Linear, "__init__", _adopting)


def _adopting(initialise: Callable[..., None]) -> Callable[..., None]:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        initialise(self, *args, **kwargs)
        from hf_stablespam.quant.layers.adapters import adopt_adapter

        adopt_adapter(self)

    return __init__
