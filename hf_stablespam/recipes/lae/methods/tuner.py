"""What the PEFT methods of this folder have in common: a layer of their own around every module that they target."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import nn


class WrappingTuner(BaseTuner):
    """Puts a layer of the class ``tuner_layer_cls`` around the modules that PEFT finds, one for all adapters."""

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer_class: Any = self.tuner_layer_cls
        if isinstance(target, layer_class):
            target.update_layer(adapter_name, peft_config)
        else:
            layer = layer_class(target, adapter_name, peft_config)
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            setattr(parent, target_name, layer)
