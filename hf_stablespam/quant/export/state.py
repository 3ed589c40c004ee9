"""The tensors of a model, whole and in one dtype, for a checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_stablespam._sharded import full


def whole_state_dict(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The state dict with floating-point tensors in `dtype` and sharded ones gathered; tied tensors stay tied.

    A collective operation where tensors are sharded.

    Args:
        model: any module.
        dtype: of every floating-point tensor.
    """
    # By the tensors themselves: an address may be given again to the next gathered tensor.
    known: dict[int, Tensor] = {}
    result = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in known:
            gathered = full(tensor.detach())
            known[id(tensor)] = gathered.to(dtype) if gathered.is_floating_point() else gathered
        result[name] = known[id(tensor)]
    return result
