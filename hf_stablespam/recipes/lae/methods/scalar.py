"""The learnable scalar that calibrates how fast a PEFT module adapts."""

from __future__ import annotations

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


def learnable_scalar(device: torch.device, dtype: torch.dtype | None) -> nn.Parameter:
    """A parameter of no dimension that starts at 1."""
    return nn.Parameter(torch.ones((), device=device, dtype=dtype))


def is_active(layer: BaseTunerLayer, name: str, container: nn.ModuleDict | nn.ParameterDict) -> bool:
    """Whether the layer is to use the adapter `name`: it has it, and adapters are not disabled."""
    return name in container and not layer.disable_adapters
