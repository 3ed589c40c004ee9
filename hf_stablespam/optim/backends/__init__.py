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
from hf_stablespam.optim.backends.base import Backend, share_layout
from hf_stablespam.optim.backends.loop import Loop
from hf_stablespam.optim.backends.numba_ops import NumbaOps
from hf_stablespam.optim.backends.torch_ops import TorchOps
from hf_stablespam.optim.plan import Options, State

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
logger = logging.getLogger(__name__)


class Kind(NamedTuple):
    """What the passes over a tensor depend on, beside options; ``MOMENTS`` are left out where there are none."""

    device: torch.device
    types: tuple[type, ...]  # of weight, gradient, M, V
    dtypes: tuple[torch.dtype, ...]
    shares_layout: bool

    @property
    def rescales(self) -> bool:
        """Whether the gradient is to be rescaled, not used."""
        return len(self.dtypes) == 2


def kind_of(param: Tensor, grad: Tensor, state: State) -> Kind:
    """The kind of a weight, or of this process's part of a sharded one; a ValueError if the shapes differ."""
    tensors = [param, grad, state["exp_avg"], state["exp_avg_sq"]] if "exp_avg" in state else [param, grad]
    shape = param.shape
    for tensor in tensors:
        if tensor.shape != shape:  # kernels would read past its end
            found = ", ".join(str(tuple(other.shape)) for other in tensors[1:])
            raise ValueError(
                f"gradient and moments must have the shape of their parameter, {tuple(shape)}, got {found}; "
                "if other data were put into the parameter, make the optimizer anew, or delete its state[parameter]"
            )
    dtypes = tuple([tensor.dtype for tensor in tensors])
    return Kind(param.device, tuple(map(type, tensors)), dtypes, share_layout(tensors))


def choose_backend(kind: Kind, options: Options) -> type[Backend]:
    """The backend for tensors of one kind in one group; a RuntimeError if ``fused`` is forced where it cannot be."""
    if torch.compiler.is_compiling():
        return Loop
    fused, device = options["fused"], kind.device.type
    backend = _passes(kind, fused, options["foreach"])
    # PyTorch's AdamW underflows in float16, and forced to be fused on the CPU it reads past the gaps of a tensor
    fits = kind.dtypes[0] == kind.dtypes[-1] != torch.float16 and (kind.shares_layout or not fused)
    if is_plain_adamw(options) and fits and device == "cpu" and _is_plain(kind) and not kind.rescales:
        backend = with_adamw(backend)
    _say(device, backend.label)
    return backend


def _is_plain(kind: Kind) -> bool:
    """Whether all are ordinary tensors with memory of their own, not `DTensor` or another subclass."""
    return set(kind.types) <= {Tensor, torch.nn.Parameter}


def _passes(kind: Kind, fused: bool | None, foreach: bool | None) -> type[Backend]:
    device = kind.device.type
    if fused and device not in ("cpu", "cuda"):
        raise RuntimeError(f"fused=True needs parameters on CPU or CUDA, got one on {device}; leave fused=None")
    if fused and device == "cuda" and not has_triton():
        raise RuntimeError("fused=True needs triton for parameters on CUDA, which is not installed; pip install triton")
    if not _is_plain(kind):
        return Loop
    if kind.shares_layout and (fused or (fused is None and not foreach)):
        if device == "cpu" and numba_ops.can_run(*kind.dtypes[:3]):
            return NumbaOps
        # on request only: nobody has run these kernels on a GPU yet
        if fused and device == "cuda" and kind.dtypes[0] in TRITON_DTYPES:
            from hf_stablespam.optim.backends.triton_ops import TritonOps  # optional, and slow to import

            return TritonOps
    return TorchOps if foreach or (foreach is None and device in ("cpu", "cuda")) else Loop


@cache
def _say(device: str, label: str) -> None:
    announce(logger, "optimizer steps on %s are made by %s", device, label)


@cache
def has_triton() -> bool:
    """Whether the Triton kernels can be imported."""
    return find_spec("triton") is not None
