"""The tensors of a model, whole and in one dtype, for a checkpoint."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from hf_stablespam._sharded import full


def whole_state_dict(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The state dict with floating-point tensors in `dtype` and sharded ones gathered; tied tensors stay tied.

    What transformers keeps in float32 in a model of that dtype (the routers of most mixtures) stays in its own. A
    collective operation where tensors are sharded.

    Args:
        model: any module.
        dtype: of every other floating-point tensor.
    """
    kept = _kept_in_float32(model, dtype)
    # By the tensors themselves: an address may be given again to the next gathered tensor.
    known: dict[int, Tensor] = {}
    result = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in known:
            gathered = full(tensor.detach())
            stays = kept.search(name) or not gathered.is_floating_point()
            known[id(tensor)] = gathered if stays else gathered.to(dtype)
        result[name] = known[id(tensor)]
    return result


def _kept_in_float32(model: Any, dtype: torch.dtype) -> re.Pattern[str]:
    """What the names of tensors match that `from_pretrained` loads in float32, whatever they are stored in."""
    names: set[str] = set()
    if dtype in (torch.float16, torch.bfloat16):
        names |= set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        names |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return re.compile("|".join(name.replace("*", ".*") for name in sorted(names)) or "(?!)")  # the last matches nothing
