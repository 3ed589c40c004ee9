"""Weights that transformers takes apart for a family's checkpoints, and cannot put together beside packed ones."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from hf_stablespam.quant.export.experts import ONE_EXPERT

logger = logging.getLogger(__name__)


def splits_others(folder: Path, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a written checkpoint holds pieces of a tensor that is none of experts, which a warning then says.

    The convolutions of OLMo Hybrid and Bailing are stored in three pieces. With a quantizer transformers (5.23) gives
    the operation that puts them together no tensor at all, and fails; under the model's own names it finds them.

    Args:
        folder: what `save_pretrained` has written.
        tensors: what it was given.
    """
    from safetensors import safe_open

    shapes = {tuple(tensor.shape) for tensor in tensors.values()}
    pieces: list[str] = []
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            for name in set(opened.keys()) - tensors.keys():
                if not ONE_EXPERT.search(name) and tuple(opened.get_slice(name).get_shape()) not in shapes:
                    pieces.append(name)
    if pieces:
        logger.warning(
            "weights are stored under the names that transformers uses in memory, and not under those of the family's"
            " checkpoints (%s): it cannot put these together beside packed ones, and other engines may not know them",
            ", ".join(sorted(pieces)[:3]),
        )
    return bool(pieces)
