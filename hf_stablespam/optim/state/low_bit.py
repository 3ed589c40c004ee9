"""Adam's moments in 8 or 4 bits: torchao's storage, and a quicker way into it.

torchao keeps a tensor as codes, one scale for each block of 256 (8-bit) or 128 (4-bit) entries, and a table of levels:
the dynamic levels of arXiv 2110.02861 in 8 bits; dynamic for ``M`` and linear, without a zero, for ``V`` in 4 bits
(arXiv 2309.01507). Its own search for the nearest level takes 161 ms for a million entries on one CPU core (36 ms
compiled). Here the upper 16 bits of the scaled entry, which are a bfloat16 number, are looked up in a table of all
65,536 of them: 2.6 ms, with nothing to compile. Three codes of a hundred differ, each by one level, where an entry
lies so near the middle of two levels that rounding to bfloat16 decides.

A ``V`` above zero is never stored as zero: its ``M`` may well be stored as something else, and a gradient of zero (a
token that does not occur in the batch) would then divide by ε alone.

States are saved, loaded and pickled. For `copy.deepcopy`, torchao's tensors are taught to clone themselves.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from hf_stablespam._sharded import is_sharded
from hf_stablespam.optim.plan import MOMENTS, State

BITS = (4, 8, 32)
SMALLEST = 4096  # entries; smaller tensors are kept in full, as torchao and bitsandbytes do
_BLOCK = {8: 256, 4: 128}
_TABLES: dict[tuple[int, bool, torch.device], Tensor] = {}


def require_torchao(state_bits: int) -> Any:
    """torchao's storage class; its import also lets `torch.load(weights_only=True)` read states of that class."""
    try:
        from torchao.optim.subclass_4bit import OptimState4bit
        from torchao.optim.subclass_8bit import OptimState8bit
    except ImportError as error:
        raise ImportError(
            f"state_bits={state_bits} needs torchao; install it with: pip install 'hf_stablespam[lowbit]'"
        ) from error
    storage = {8: OptimState8bit, 4: OptimState4bit}[state_bits]
    _teach_to_clone(storage)
    return storage


@cache
def _teach_to_clone(storage: Any) -> None:
    """Register what `copy.deepcopy` asks of a tensor with torchao's class, unless that knows it already."""
    clone = torch.ops.aten.clone.default
    if clone not in getattr(storage, "_ATEN_OP_TABLE", {}).get(storage, {}):
        storage.implements(clone)(_clone)


def _clone(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    names, attributes = args[0].__tensor_flatten__()
    parts = {name: getattr(args[0], name).clone() for name in names}
    return type(args[0]).__tensor_unflatten__(parts, attributes)


def fits(tensor: Tensor, bits: int) -> bool:
    """Whether moments like this tensor are stored in ``bits``: it has at least 4096 entries, in whole blocks."""
    if bits < 32 and is_sharded(tensor):  # blocks would not follow its shards
        raise ValueError(
            f"state_bits must be 32 for a sharded parameter (DTensor), got {bits} for one of shape "
            f"{tuple(tensor.shape)}; train with DDP, or set state_bits=32 and state_dtype=torch.bfloat16"
        )
    return bits < 32 and tensor.numel() >= SMALLEST and tensor.numel() % _BLOCK[bits] == 0


def zero_moments(shape: torch.Size, bits: int, device: torch.device) -> dict[str, Tensor]:
    """``exp_avg`` (signed) and ``exp_avg_sq`` (unsigned) of a shape that `fits`, all zero."""
    storage = require_torchao(bits)
    return {
        name: storage.zeros(shape, signed=signed, block_size=_BLOCK[bits], device=device, dtype=torch.float32)
        for name, signed in (("exp_avg", True), ("exp_avg_sq", False))
    }


def is_low_bit(moment: Tensor) -> bool:
    """Whether a moment is stored in 8 or 4 bits."""
    return type(moment) is not Tensor and hasattr(moment, "codes")


def read(moment: Tensor, dtype: torch.dtype) -> Tensor:
    """A moment, however it is stored, as a tensor of ``dtype``."""
    return (moment.dequantize() if is_low_bit(moment) else moment).to(dtype)


def write(moment: Tensor, value: Tensor, finite: Tensor) -> None:
    """Store a moment's new value where ``finite`` (bool, 0-dimensional); otherwise leave every bit as it is."""
    if not is_low_bit(moment):
        moment.copy_(torch.where(finite, value.to(moment.dtype), moment))
        return
    for stored, new in zip((moment.codes, moment.scale), _encode(moment, value), strict=True):  # type: ignore[attr-defined]
        stored.copy_(torch.where(finite, new.view_as(stored), stored))


def restore(fresh: Tensor, saved: Tensor) -> Tensor:
    """Put a saved tensor into a fresh one: bit for bit where both are stored alike, otherwise as `write` does."""
    if is_low_bit(fresh) and type(fresh) is not type(saved):
        write(fresh, read(saved, torch.float32).to(fresh.device), torch.tensor(True, device=fresh.device))
        return fresh
    return fresh.copy_(saved if is_low_bit(fresh) else read(saved, fresh.dtype))


def clear_moments(state: State) -> None:
    """Set the moments of a parameter and their step count to zero."""
    for name in (*MOMENTS, "moment_step"):
        moment: Any = state[name]
        for stored in (moment.codes, moment.scale) if is_low_bit(moment) else (moment,):
            stored.zero_()


def _encode(moment: Any, value: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of a value, laid out as torchao does: in 4 bits the first of two entries in the upper half."""
    blocks = value.to(torch.float32).reshape(-1, moment.block_size)
    scale = blocks.abs().amax(dim=-1)
    scaled = blocks / scale.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
    keys = scaled.to(torch.bfloat16).view(torch.int16).view(-1).int() & 0xFFFF
    codes = _codes_of_keys(moment.qmap, moment.signed).index_select(0, keys)
    if moment.codes.numel() < codes.numel():
        codes = (codes[::2] << 4) | codes[1::2]
    return codes, scale


def _codes_of_keys(levels: Tensor, signed: bool) -> Tensor:
    """The nearest level's code for each bfloat16 number, by its bits: (65536,) uint8."""
    key = (len(levels), signed, levels.device)
    if key not in _TABLES:
        bits = torch.arange(1 << 16, dtype=torch.int32, device=levels.device)
        numbers = bits.to(torch.int16).view(torch.bfloat16).float().nan_to_num()
        codes = torch.bucketize(numbers, (levels[:-1] + levels[1:]) / 2)
        if not signed:
            smallest = torch.nonzero(levels > 0)[0]
            codes = torch.where(numbers > 0, codes.maximum(smallest), codes)
        _TABLES[key] = codes.to(torch.uint8)
    return _TABLES[key]
