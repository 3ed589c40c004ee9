"""Who does the passes over the tensors: the choice by options, device, dtype and layout."""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from hf_stablespam.optim.backends import numba_ops
from hf_stablespam.optim.backends.adamw import is_plain_adamw, with_adamw
from hf_stablespam.optim.backends.base import Backend, is_plain_tensor, share_layout
from hf_stablespam.optim.backends.loop import Loop
from hf_stablespam.optim.backends.numba_ops import NumbaOps
from hf_stablespam.optim.backends.torch_ops import TorchOps
from hf_stablespam.optim.plan import Options, State
from hf_stablespam.optim.state.low_bit import is_low_bit

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    if torch.compiler.is_compiling() or is_low_bit(state.get("exp_avg", grad)):
        return Loop
    backend = _choose(param, grad, state, options)
    if param.is_cpu and is_plain_adamw(options) and "exp_avg" in state and _fits_adamw(param, grad, state, options):
        return with_adamw(backend)
    return backend


def _choose(param: Tensor, grad: Tensor, state: State, options: Options) -> type[Backend]:
    fused, foreach = options["fused"], options["foreach"]
    if fused:
        _check_fused(param)
    if not is_plain_tensor(param, grad):
        return Loop
    if fused or (fused is None and not foreach):
        tensors = [param, grad, state.get("exp_avg", grad), state.get("exp_avg_sq", grad)]
        if param.is_cpu and numba_ops.takes(tensors, rescales="exp_avg" not in state):
            return NumbaOps
        # on request only: nobody has run these kernels on a GPU yet
        if fused and param.is_cuda and param.dtype in TRITON_DTYPES and share_layout(tensors):
            return _triton_backend()
    if foreach or (foreach is None and (param.is_cpu or param.is_cuda)):
        return TorchOps
    return Loop


def _check_fused(param: Tensor) -> None:
    if not (param.is_cpu or param.is_cuda):
        raise RuntimeError(f"fused=True needs parameters on CPU or CUDA, got one on {param.device}; leave fused=None")
    if param.is_cuda and not has_triton():
        raise RuntimeError("fused=True needs triton for parameters on CUDA, which is not installed; pip install triton")


@cache
def has_triton() -> bool:
    """Whether the Triton kernels can be imported."""
    return find_spec("triton") is not None


def _triton_backend() -> type[Backend]:
    """The backend of `triton_kernels`; triton is optional, and slow to import."""
    from hf_stablespam.optim.backends.triton_ops import TritonOps

    return TritonOps


def _fits_adamw(param: Tensor, grad: Tensor, state: State, options: Options) -> bool:
    """PyTorch's AdamW underflows in float16, and forced to be fused on the CPU it reads past the gaps of a tensor."""
    gapless = not options["fused"] or share_layout([param, grad, state["exp_avg"], state["exp_avg_sq"]])
    return param.dtype == state["exp_avg"].dtype != torch.float16 and gapless
