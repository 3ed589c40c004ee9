"""Tensors and metadata → a GGUF file, which is there whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch


class TensorPlan(NamedTuple):
    """A tensor of the file, made when its turn comes, so that one at a time is in memory.

    Attributes:
        name: in the file.
        type: name of ggml's type: ``"F32"``, ``"Q4_0"``, …
        shape: of its numbers, not of its bytes.
        data: gives the array to write: bytes for packed types.
        verify: takes the array that was read back, and raises if it is not what was trained; None: nothing to verify.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    data: Callable[[], np.ndarray]
    verify: Callable[[np.ndarray], None] | None = None


def gathering_together(plan: TensorPlan, meet: Callable[[], None]) -> TensorPlan:
    """The plan, with `meet` before each time that shards are gathered for it."""

    def data() -> np.ndarray:
        meet()
        return plan.data()

    def verify(stored: np.ndarray) -> None:
        assert plan.verify is not None
        meet()
        plan.verify(stored)

    return plan._replace(data=data, verify=plan.verify and verify)


def check_absent(file: Path, overwrite: bool) -> None:
    """Raise if `file` may not be written."""
    if file.is_dir():
        raise IsADirectoryError(f"file must be the name of a GGUF file, got the folder {file}; write {file}/model.gguf")
    if file.exists() and not overwrite:
        raise FileExistsError(f"{file} exists; pass overwrite=True (--overwrite) to replace it, or give another name")


def write_tensors(
    file: Path, architecture: str, add_metadata: Callable[[Any], None], plans: Sequence[TensorPlan]
) -> None:
    """Write a GGUF file.

    Args:
        file: where.
        architecture: llama.cpp's name.
        add_metadata: takes the `gguf.GGUFWriter`.
        plans: the tensors, in the order of the file.
    """
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(file, architecture)
    try:
        add_metadata(writer)
        for plan in plans:
            kind = GGMLQuantizationType[plan.type]
            shape, dtype = _stored(plan, kind)
            writer.add_tensor_info(plan.name, shape, dtype, _bytes(plan, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for plan in plans:
            writer.write_tensor_data(plan.data())
        writer.flush()
    finally:
        writer.close()


def verify_tensors(file: Path, plans: Sequence[TensorPlan]) -> None:
    """Read `file` again and verify each tensor that has something to be verified by.

    Raises:
        RuntimeError: a tensor is not what was trained.
    """
    from gguf import GGUFReader

    class Reader(GGUFReader):
        """With its file as a plain array: a `np.memmap` is slow to slice for each token of the vocabulary."""

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, np.asarray(value) if name == "data" else value)

    stored = {tensor.name: tensor for tensor in Reader(file).tensors}
    for plan in plans:
        if plan.verify is not None:
            plan.verify(stored[plan.name].data)


def to_numpy(tensor: torch.Tensor, type: str) -> np.ndarray:
    """The array that ggml's unpacked type, or Q8_0, stores for `tensor`."""
    from gguf import GGMLQuantizationType, quants

    if type == "BF16":
        return tensor.detach().cpu().to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    numbers = tensor.detach().cpu().float().numpy()
    return quants.quantize(numbers, GGMLQuantizationType[type])


def _stored(plan: TensorPlan, kind: Any) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of the array in the file."""
    from gguf.quants import quant_shape_to_byte_shape

    if plan.type in ("F32", "F16"):
        return plan.shape, np.dtype(np.float32 if plan.type == "F32" else np.float16)
    return quant_shape_to_byte_shape(plan.shape, kind), np.dtype(np.uint8)


def _bytes(plan: TensorPlan, kind: Any) -> int:
    shape, dtype = _stored(plan, kind)
    return int(np.prod(shape)) * dtype.itemsize
