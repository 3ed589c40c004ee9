"""A GGUF file of float numbers, as llama.cpp's converter writes it → the same with its 4-bit matrices packed."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_stablespam._announce import announce
from hf_stablespam._atomic import atomic_file
from hf_stablespam.quant.export.checks import configurations, four_bit_layers
from hf_stablespam.quant.export.experts import four_bit_experts
from hf_stablespam.quant.export.gguf.blocks import TYPES
from hf_stablespam.quant.export.gguf.checks import EMBEDDING_TYPES, check_formats, check_gguf_package
from hf_stablespam.quant.export.gguf.export import FILE_TYPES
from hf_stablespam.quant.export.gguf.grid import RECOVER
from hf_stablespam.quant.export.gguf.writer import (
    TensorPlan,
    check_absent,
    to_numpy,
    verify_tensors,
    write_tensors,
)
from hf_stablespam.quant.export.unpacked import grid_experts, grid_weight
from hf_stablespam.quant.layers.experts import weight_names

logger = logging.getLogger(__name__)

EMBEDDINGS = ("token_embd.weight", "output.weight")
READABLE = ("F32", "F16")
# Written anew by `GGUFWriter`, or said otherwise here.
OWN_FIELDS = ("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count", "general.architecture", "general.file_type")


def repack_gguf(
    source: str | os.PathLike[str],
    file: str | os.PathLike[str],
    like: nn.Module | None = None,
    *,
    embedding: str = "q8_0",
    overwrite: bool = False,
) -> list[str]:
    """Pack every matrix of a GGUF file that lies on a 4-bit grid, for whatever architecture.

    The grid is recovered from the numbers (Q4_0 or MXFP4), and the packed numbers are the same, bit for bit, which is
    verified on the file; a matrix that lies on no grid stays as it is. NVFP4 cannot be recovered.

    Args:
        source: a file in F16 or F32, from ``convert_hf_to_gguf.py --outtype f16`` on a checkpoint that holds the 4-bit
            numbers: ``hf-stablespam export --to unpacked``, or an exported ``int4`` checkpoint.
        file: what to write.
        like: the model that was trained, converted by `convert_to_4bit`; each row of its 4-bit weights must then be
            found among the packed ones. (Converters reorder, split and join rows, they do not change them.)
        embedding: type of the embedding and the head where these are on no grid: ``"q8_0"``, ``"f16"`` or ``"f32"``.
        overwrite: replace a file of that name.

    Returns:
        Names of the matrices that lie on no grid, without embedding and head.

    Raises:
        ImportError: the package gguf is not installed.
        FileExistsError: the file exists.
        ValueError: nothing lies on a grid, or a row of `like` is not there; nothing is written.

    Example:
        >>> repack_gguf("model-f16.gguf", "model-q4_0.gguf")  # doctest: +SKIP
        []
    """
    check_gguf_package()
    if embedding not in EMBEDDING_TYPES:
        raise ValueError(f"embedding must be one of {', '.join(map(repr, EMBEDDING_TYPES))}, got {embedding!r}")
    source, file = Path(source), Path(file)
    check_absent(file, overwrite)
    if file.resolve() == source.resolve():
        raise ValueError(f"file must be another than the source, got {str(file)!r} for both")
    from gguf import GGUFReader

    reader = GGUFReader(source)
    types = check_like(like) if like is not None else list(RECOVER)
    plans, plain = _plans(reader, types, embedding)
    packed = [plan for plan in plans if plan.type in RECOVER]
    if not packed:
        raise ValueError(
            f"no matrix of {source} lies on a 4-bit grid ({', '.join(types)}); convert a checkpoint that holds the"
            " 4-bit numbers (hf-stablespam export --to unpacked RUN FOLDER) with --outtype f16 or f32, not bf16"
        )
    if like is not None:
        _check_rows(like, reader, {plan.name for plan in packed})
    architecture = reader.fields["general.architecture"].contents()
    with atomic_file(file) as path:
        write_tensors(path, architecture, lambda writer: _copy_metadata(reader, writer, packed[0].type), plans)
        verify_tensors(path, plans)
    if plain:
        logger.warning("%d matrices lie on no 4-bit grid and stay as they are: %s", len(plain), ", ".join(plain))
    announce(logger, "packed %d of %d tensors into %s", len(packed), len(plans), file)
    return plain


def check_like(like: nn.Module) -> list[str]:
    """ggml's types for the layers of a converted model; raises if one cannot be recovered from numbers."""
    configs = configurations(like)
    if not configs:
        raise ValueError("like must be converted to 4 bits; call convert_to_4bit(model, config) first")
    check_formats(like)
    types = []
    for config in configs:
        assert config.weight is not None  # check_formats
        types.append(TYPES[config.weight])
        if types[-1] not in RECOVER:
            raise ValueError(
                f"weight={config.weight!r} cannot be recovered from a file of numbers; export the model with"
                " export_4bit and let llama.cpp's convert_hf_to_gguf.py read that: it takes the codes over"
            )
    return list(dict.fromkeys(types))


def _plans(reader: Any, types: Sequence[str], embedding: str) -> tuple[list[TensorPlan], list[str]]:
    """All tensors of the new file, and the names of matrices that lie on no grid."""
    plans, plain = [], []
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        kind = tensor.tensor_type.name
        matrix = len(shape) in (2, 3) and kind in READABLE and min(shape) > 1  # three: the experts of a layer
        packed, chosen = None, kind
        if matrix:
            values = _float(tensor.data)
            for chosen in types:
                packed = RECOVER[chosen](values)
                if packed is not None:
                    break
        if packed is not None:
            plans.append(_packed_plan(tensor.name, chosen, shape, packed, tensor.data))
        elif matrix and tensor.name in EMBEDDINGS and (embedding != "q8_0" or shape[-1] % 32 == 0):
            plans.append(_embedding_plan(tensor.name, embedding.upper(), shape, tensor.data))
        else:
            plans.append(TensorPlan(tensor.name, kind, shape, partial(np.array, tensor.data)))
            if len(shape) > 1 and tensor.name not in EMBEDDINGS:
                plain.append(tensor.name)
    return plans, plain


def _packed_plan(name: str, type: str, shape: tuple[int, ...], packed: Tensor, source: np.ndarray) -> TensorPlan:
    from gguf import GGMLQuantizationType, quants

    def verify(stored: np.ndarray) -> None:
        numbers = torch.from_numpy(quants.dequantize(stored, GGMLQuantizationType[type]))
        different = int((numbers != _float(source)).sum())
        if different:
            raise RuntimeError(
                f"{name}: {different} numbers read back are not those of the source; nothing was written"
            )

    return TensorPlan(name, type, shape, packed.numpy, verify)


def _embedding_plan(name: str, type: str, shape: tuple[int, ...], source: np.ndarray) -> TensorPlan:
    return TensorPlan(name, type, shape, lambda: to_numpy(_float(source), type))


def _float(data: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(data, dtype=np.float32))


def _check_rows(like: nn.Module, reader: Any, packed: set[str]) -> None:
    """Raise unless every row of the trained 4-bit weights is among the packed ones."""
    found: Counter[bytes] = Counter()
    for tensor in reader.tensors:
        if tensor.name in packed:
            found.update(_digests(_float(tensor.data)))
    missing = []
    for name, rows in _trained_rows(like):
        absent = sum((Counter(_digests(rows)) - found).values())
        if absent:
            missing.append(f"{name} ({absent} of {len(rows)} rows)")
    if missing:
        raise ValueError(
            f"the file does not hold the trained weights of {', '.join(missing[:5])}"
            f"{f' and {len(missing) - 5} more' if len(missing) > 5 else ''}; convert the checkpoint that"
            " hf-stablespam export --to unpacked writes of this run, with --outtype f16 or f32"
        )


def _trained_rows(like: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The rows of every 4-bit weight, with its name."""
    for name, layer in four_bit_layers(like).items():
        yield name, grid_weight(layer)
    for key, block in four_bit_experts(like).items():
        for name in weight_names(block):
            grid = grid_experts(block, name)
            yield f"{key}.{name}", (grid.mT if block.is_transposed else grid).flatten(0, 1)


def _digests(rows: Tensor) -> list[bytes]:
    """A digest of each row; minus zero counts as zero."""
    numbers = (rows.flatten(0, -2).float() + 0.0).cpu().numpy()
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in numbers]


def _copy_metadata(reader: Any, writer: Any, packed_type: str) -> None:
    """The source's metadata, with the new type."""
    import gguf

    for name, field in reader.fields.items():
        if name in OWN_FIELDS:
            continue
        kind, value = field.types[0], field.contents()
        if kind is not gguf.GGUFValueType.ARRAY:
            writer.add_key_value(name, value, kind)
        elif value:  # the type of an empty array's entries is not said
            writer.add_key_value(name, value, kind, sub_type=field.types[-1])
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[packed_type]])
