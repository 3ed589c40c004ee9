"""Whether transformers can load a model whose layers are packed, and how, where it cannot plainly."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)


def warn_of_initialization(model: nn.Module, packed: Iterable[str]) -> None:
    """Warn if `from_pretrained` will ask a packed layer for its ``weight``, and say how the checkpoint loads then.

    It initializes what a checkpoint lacks, module by module; RWKV, Mamba and a few others set the weight of a linear
    layer there without looking whether it has one.

    Args:
        model: a transformers model.
        packed: names of the layers that are stored without ``weight``.
    """
    missing = _missing(model, packed)
    if missing is not None:
        logger.warning(
            "%s: transformers fails to load packed layers of this model plainly (%s, in its _init_weights);"
            " from_pretrained(..., quantization_config=CompressedTensorsConfig(dequantize=True)) of transformers 5"
            " loads them",
            *(type(model).__name__, missing),
        )


def warn_of_float32_scales(model: nn.Module) -> None:
    """Warn if transformers will load the scales of packed layers in float32, into a bfloat16 model.

    HYV4 keeps its parameters called ``scale`` in float32, and transformers takes ``weight_scale`` for one of them.
    """
    kept = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    if "scale" in kept or "weight_scale" in kept:
        logger.warning(
            "%s: transformers keeps what is called 'scale' in float32, and so the packed layers' weight_scale, which"
            " fails beside bfloat16; from_pretrained(..., dtype=torch.float32) loads the checkpoint",
            type(model).__name__,
        )


def _missing(model: Any, packed: Iterable[str]) -> str | None:
    """What initializing a weightless twin of the model fails with; None where it goes through."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            twin = type(model)(copy.deepcopy(model.config))
        for name in packed:
            del twin.get_submodule(name).weight
    except Exception:  # a class that is not made from its configuration alone: nothing is known of it
        return None
    for module in twin.modules():
        try:
            twin._init_weights(module)
        except AttributeError as error:
            return str(error)
        except Exception:  # what does not work on the meta device says nothing
            continue
    return None
