"""Who does the passes over the tensors: the choice by options, device, dtype and layout."""

import logging
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from hf_stablespam._announce import announce
from hf_stablespam.optim.backends import numba_ops
from hf_stablespam.optim.backends.adamw import is_plain_adamw, with_adamw
from hf_stablespam.optim.backends.base import Backend, is_plain_tensor, share_layout
from hf_stablespam.optim.backends.loop import Loop
from hf_stablespam.optim.backends.numba_ops import NumbaOps
from hf_stablespam.optim.backends.torch_ops import TorchOps
from hf_stablespam.optim.plan import Options, State

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
logger = logging.getLogger(__name__)


class Kind(NamedTuple):
    """What the choice for a tensor depends on, beside options."""

    device: str
    dtypes: tuple[torch.dtype, ...]  # of weight, gradient, M, V
    is_plain: bool  # all of them are ordinary tensors
    shares_layout: bool
    rescales: bool  # there are no moments: the gradient is to be rescaled, not used


def choose_backend(param: Tensor, grad: Tensor, state: State, options: Options) -> type[Backend]:
    """The backend for one tensor.

    Args:
        param: weight, or this process's part of a sharded one.
        grad: its gradient.
        state: its state; without moments the gradient is to be rescaled, not used.
        options: the parameter group, with ``fused`` and ``foreach``.

    Raises:
        RuntimeError: if the fused path is forced for a device that has none.
    """
    if torch.compiler.is_compiling():
        return Loop
    tensors = [param, grad, state.get("exp_avg", grad), state.get("exp_avg_sq", grad)]
    device = "cpu" if param.is_cpu else "cuda" if param.is_cuda else f"another device ({param.device})"
    dtypes = tuple([tensor.dtype for tensor in tensors])
    kind = Kind(device, dtypes, is_plain_tensor(*tensors), share_layout(tensors), "exp_avg" not in state)
    return _choose(kind, options["fused"], options["foreach"], is_plain_adamw(options))


@cache
def _choose(kind: Kind, fused: bool | None, foreach: bool | None, plain_adamw: bool) -> type[Backend]:
    backend = _passes(kind, fused, foreach)
    # PyTorch's AdamW underflows in float16, and forced to be fused on the CPU it reads past the gaps of a tensor
    fits = kind.dtypes[0] == kind.dtypes[2] != torch.float16 and (kind.shares_layout or not fused)
    if plain_adamw and fits and kind.device == "cpu" and kind.is_plain and not kind.rescales:
        backend = with_adamw(backend)
    _say(kind.device, backend.label)
    return backend


def _passes(kind: Kind, fused: bool | None, foreach: bool | None) -> type[Backend]:
    if fused and kind.device not in ("cpu", "cuda"):
        raise RuntimeError(f"fused=True needs parameters on CPU or CUDA, got one on {kind.device}; leave fused=None")
    if fused and kind.device == "cuda" and not has_triton():
        raise RuntimeError("fused=True needs triton for parameters on CUDA, which is not installed; pip install triton")
    if not kind.is_plain:
        return Loop
    if kind.shares_layout and (fused or (fused is None and not foreach)):
        if kind.device == "cpu" and numba_ops.can_run(*kind.dtypes[:3], kind.rescales):
            return NumbaOps
        # on request only: nobody has run these kernels on a GPU yet
        if fused and kind.device == "cuda" and kind.dtypes[0] in TRITON_DTYPES:
            from hf_stablespam.optim.backends.triton_ops import TritonOps  # optional, and slow to import

            return TritonOps
    return TorchOps if foreach or (foreach is None and kind.device in ("cpu", "cuda")) else Loop


@cache
def _say(device: str, label: str) -> None:
    announce(logger, "optimizer steps on %s are made by %s", device, label)


@cache
def has_triton() -> bool:
    """Whether the Triton kernels can be imported."""
    return find_spec("triton") is not None
