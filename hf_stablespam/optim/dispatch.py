"""Which path updates which tensor: loop, foreach, fused, or PyTorch's own AdamW where nothing else is asked for."""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from hf_stablespam.optim.fused_cpu import FUSED_DTYPES, fused_cpu_step
from hf_stablespam.optim.galore import galore_path, is_projected
from hf_stablespam.optim.low_bit import is_low_bit
from hf_stablespam.optim.multi_tensor import foreach_step
from hf_stablespam.optim.pieces import is_plain_tensor, share_layout
from hf_stablespam.optim.plain_adamw import is_plain_adamw, plain_adamw_step, unscale
from hf_stablespam.optim.plan import Batch, Options, Result, State
from hf_stablespam.optim.single_tensor import stable_spam_step
from hf_stablespam.optim.stabilized_gradient import gradient_statistics

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


Path = Callable[[Batch, Options], dict[str, Tensor]]


def step_group(batch: Batch, options: Options) -> list[Result]:
    """Update the parameters of one group, each by the fastest path that fits it.

    Args:
        batch: parameters, dense gradients, states.
        options: the parameter group.

    Raises:
        RuntimeError: if the fused path is forced for a device that has none.
    """
    sets: dict[tuple[Path, torch.device, torch.dtype], list[int]] = {}
    for index, (param, grad, state) in enumerate(zip(*batch, strict=True)):
        path = choose_path(param, grad, state, options)
        sets.setdefault((path, param.device, param.dtype), []).append(index)
    parts = [(path, batch.pick(indices)) for (path, _, _), indices in sets.items()]
    return [Result(part.params, path(part, options)) for path, part in parts]


def choose_path(param: Tensor, grad: Tensor, state: State, options: Options) -> Path:
    """The path for one tensor, from the options ``fused`` and ``foreach``, its device, its dtype and its layout."""
    if is_projected(state):
        return galore_path
    if torch.compiler.is_compiling() or is_low_bit(state["exp_avg"]):
        return loop_step
    if param.is_cpu and is_plain_adamw(options) and _fits_plain_adamw(param, grad, state, options):
        return plain_step
    fused, foreach = options["fused"], options["foreach"]
    if fused:
        _check_fused(param)
    if not is_plain_tensor(param, grad):
        return loop_step
    tensors = [param, grad, state["exp_avg"], state["exp_avg_sq"]]
    if param.is_cpu and (fused or (fused is None and not foreach)):
        if param.dtype in FUSED_DTYPES and share_layout(tensors):
            return fused_cpu_step
    elif fused and param.dtype in TRITON_DTYPES and share_layout(tensors):
        return _triton_step  # only on request: nobody has run these kernels on a GPU yet
    if foreach or (foreach is None and param.is_cuda):
        return foreach_step
    return loop_step


def _check_fused(param: Tensor) -> None:
    if not (param.is_cpu or param.is_cuda):
        raise RuntimeError(f"fused=True needs parameters on CPU or CUDA, got one on {param.device}; leave fused=None")
    if param.is_cuda and not has_triton():
        raise RuntimeError("fused=True needs triton for parameters on CUDA, which is not installed; pip install triton")


@cache
def has_triton() -> bool:
    """Whether the Triton kernels can be imported."""
    return find_spec("triton") is not None


def _triton_step(batch: Batch, options: Options) -> dict[str, Tensor]:
    from hf_stablespam.optim.triton_step import triton_step  # triton is optional, and slow to import

    return triton_step(batch, options)


def _fits_plain_adamw(param: Tensor, grad: Tensor, state: State, options: Options) -> bool:
    """PyTorch's AdamW underflows in float16, and forced to be fused on the CPU it reads past the gaps of a tensor."""
    gapless = not options["fused"] or share_layout([param, grad, state["exp_avg"], state["exp_avg_sq"]])
    return param.dtype != torch.float16 and gapless


def loop_step(batch: Batch, options: Options) -> dict[str, Tensor]:
    """One tensor after the other: the path for everything the others do not take."""
    return _stacked([stable_spam_step(*tensors, options) for tensors in zip(*batch, strict=True)])


def plain_step(batch: Batch, options: Options) -> dict[str, Tensor]:
    """Nothing of Stable-SPAM is switched on: `torch.optim.AdamW` for the tensors whose gradient is finite."""
    rows = [gradient_statistics(grad, state, options) for _, grad, state in zip(*batch, strict=True)]
    finite = [index for index, row in enumerate(rows) if not row["nonfinite"]]
    if finite:
        chosen = batch.pick(finite)
        for state in chosen.states:
            unscale(state)
        plain_adamw_step(chosen, options)
    return _stacked(rows)


def _stacked(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
