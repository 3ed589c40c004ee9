"""A model trained in 4 bits → a GGUF file for llama.cpp, with the codes and scales that training used."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from hf_stablespam._announce import announce
from hf_stablespam._atomic import atomic_file, check_writable
from hf_stablespam._shared_errors import groups_of, shared_errors
from hf_stablespam.quant.export.checks import check_finite, configurations
from hf_stablespam.quant.export.gguf.architectures import Architecture, architecture_of
from hf_stablespam.quant.export.gguf.checks import EMBEDDING_TYPES, check_gguf, input_embedding
from hf_stablespam.quant.export.gguf.metadata import add_metadata
from hf_stablespam.quant.export.gguf.tensors import tensor_plans
from hf_stablespam.quant.export.gguf.tokenizer import Vocabulary, add_vocabulary, read_vocabulary
from hf_stablespam.quant.export.gguf.writer import check_absent, gathering_together, verify_tensors, write_tensors

logger = logging.getLogger(__name__)

FILE_TYPES = {"Q4_0": "MOSTLY_Q4_0", "MXFP4": "MOSTLY_MXFP4_MOE", "NVFP4": "MOSTLY_NVFP4"}
# Key of the file's metadata under which the 4-bit configuration stands, as in a checkpoint's config.json; where
# there are several it ends in an s, and each stands with the names of its layers.
CONFIG_KEY = "four_bit_training.config"


def export_gguf(
    model: nn.Module,
    file: str | os.PathLike[str],
    processing_class: Any = None,
    *,
    embedding: str = "q8_0",
    overwrite: bool = False,
    is_main_process: bool = True,
) -> None:
    """Write the 4-bit weights of a trained model as a GGUF file, bit for bit those of the forward pass in training.

    ``int4`` and the ``fp4_e1m2`` formats become Q4_0, ``mxfp4`` MXFP4 and ``nvfp4`` NVFP4; norms, biases and layers
    that were left alone stay float32 (matrices in bfloat16 stay bfloat16). Every packed tensor is read back and
    compared before the file gets its name.

    Args:
        model: a transformers model converted by `convert_to_4bit`, of a class in
            `hf_stablespam.quant.export.gguf.architectures.ARCHITECTURES`; it is not changed. `repack_gguf` serves all
            other classes.
        file: what to write.
        processing_class: the tokenizer, or a processor that has one; None writes none, and llama.cpp then takes and
            gives ids of tokens only.
        embedding: type of the embedding and of a head that is not 4-bit: ``"q8_0"``, ``"f16"`` or ``"f32"``.
        overwrite: replace a file of that name.
        is_main_process: False on the other processes of a distributed run, which take part but write nothing.

    Raises:
        ImportError: the package gguf is not installed.
        FileExistsError: the file exists.
        OSError: it cannot be written there, or the disk is full; `file` is then what it was.
        ValueError: the model is not converted, a weight is not finite, or something has no exact form in GGUF; the
            message says what to change.
        RuntimeError: a tensor that was read back is not what training used; no file is left.
        What one process raises, all raise that share a sharded model.

    Example:
        >>> export_gguf(model, "llama-q4_0.gguf", tokenizer)  # doctest: +SKIP
    """
    if embedding not in EMBEDDING_TYPES:
        names = ", ".join(map(repr, EMBEDDING_TYPES))
        raise ValueError(f"embedding must be one of {names}, got {embedding!r}; 'q8_0' is the default")
    file, groups = Path(file), groups_of(model.parameters())
    with shared_errors(groups):
        if is_main_process:
            check_absent(file, overwrite)
        check_gguf(model, processing_class)
        if is_main_process:
            check_writable(file)
    check_finite(dict(model.named_parameters()))
    if processing_class is None and is_main_process:
        logger.warning(
            "no tokenizer was given: %s will have no vocabulary and no chat template, so that llama.cpp can only work"
            " on ids of tokens; pass the tokenizer as processing_class",
            file,
        )
    architecture = architecture_of(model)
    with shared_errors(groups) as meet:
        plans = [gathering_together(plan, meet) for plan in tensor_plans(model, architecture, embedding)]
        if not is_main_process:
            # Gathers the shards as the main process does: of all to write them, then of those that are verified.
            for plan in [*plans, *(plan for plan in plans if plan.verify is not None)]:
                plan.data()
            return
        vocabulary = None
        if processing_class is not None:
            vocabulary = read_vocabulary(processing_class, input_embedding(model).shape[0])
        packed = Counter(plan.type for plan in plans if plan.type in FILE_TYPES)
        metadata = partial(_add_all_metadata, model, architecture, packed.most_common(1)[0][0], vocabulary)
        with atomic_file(file) as path:
            write_tensors(path, architecture.name, metadata, plans)
            verify_tensors(path, plans)
    count = packed.total()
    announce(logger, "exported %d packed and %d other tensors to %s", count, len(plans) - count, file)


def _add_all_metadata(
    model: nn.Module, architecture: Architecture, packed_type: str, vocabulary: Vocabulary | None, writer: Any
) -> None:
    import gguf

    writer.add_type("model")
    if name := getattr(model.config, "_name_or_path", ""):  # type: ignore[union-attr]
        writer.add_name(Path(name).name)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[packed_type]])
    configs = configurations(model)
    if len(configs) == 1:
        writer.add_string(CONFIG_KEY, json.dumps(next(iter(configs)).to_dict()))
    else:
        several = [{"layers": names, "config": config.to_dict()} for config, names in configs.items()]
        writer.add_string(f"{CONFIG_KEY}s", json.dumps(several))
    add_metadata(writer, model, architecture)
    add_vocabulary(writer, vocabulary)
