"""Adapters that PEFT puts over 4-bit layers are looked at there and then: converting may lie long behind."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from hf_stablespam.trainer.patching import patch


def teach_tuners(tuners: ModuleType) -> None:
    """Let every tuner of PEFT look at the model that it has just put adapters into.

    All ways go through it: `get_peft_model`, `PeftModel.from_pretrained`, `add_adapter`, `inject_adapter_in_model`.
    """
    patch(tuners.BaseTuner, "inject_adapter", _looking)


def _looking(inject: Callable[..., None]) -> Callable[..., None]:
    def inject_adapter(self: Any, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        inject(self, model, adapter_name, *args, **kwargs)
        from hf_stablespam.quant.layers.adapters import adopt_adapters, check_adapters

        adopt_adapters(model)
        check_adapters(model, trained=() if self.peft_config[adapter_name].inference_mode else (adapter_name,))

    return inject_adapter
