"""What fails on the main process fails on all that export with it, and all go on together."""

from __future__ import annotations

import errno
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("compressed_tensors", reason="export needs it; install the extra 'export'")
import transformers as tf
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from hf_stablespam._shared_errors import all_processes, groups_of, shared_errors
from hf_stablespam.quant import convert_to_4bit, export_4bit, export_gguf
from hf_stablespam.quant.export.gguf import packed
from hf_stablespam.quant.export.unpacked import export_unpacked
from hf_stablespam.trainer.callbacks.four_bit import FourBitCallback
from tests.processes import run_processes
from tests.quant.export.test_whole import INT4, llama, sharded

HAS_GGUF = importlib.util.find_spec("gguf") is not None


def refused(kind: type[Exception], words: str, call: Callable[[], Any]) -> None:
    """Every process gets the error, and none is left in a collective operation."""
    with pytest.raises(kind, match=words):
        call()
    dist.barrier()


def full_disk(*others: Any, **more: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def files_that_cannot_be_written(folder: Path) -> None:
    main = dist.get_rank() == 0
    model = sharded(convert_to_4bit(llama(), INT4))
    if main:
        (folder / "a file").write_text("no folder")
    dist.barrier()
    for export in (export_4bit, export_unpacked, *([export_gguf] if HAS_GGUF else [])):
        # Before anything is gathered: it is known before.
        with patch.object(torch.distributed.tensor.DTensor, "full_tensor", side_effect=AssertionError):
            wrong = folder / "a file" / "out"
            words = r"a file/out could not be written, and is what it was: .* MiB are free there"
            refused(OSError, words, lambda e=export, w=wrong: e(model, w, is_main_process=main))
    for export in (export_4bit, export_unpacked):
        with patch.object(tf.modeling_utils, "safe_save_file", full_disk):
            refused(
                OSError,
                "out could not .*No space left",
                lambda e=export: e(model, folder / "out", None, is_main_process=main),
            )
    assert not (folder / "out").exists()


def gguf_files(folder: Path) -> None:
    import gguf

    main, file = dist.get_rank() == 0, folder / "model.gguf"
    model = sharded(convert_to_4bit(llama(), INT4))
    export_gguf(model, file, is_main_process=main)
    dist.barrier()
    with patch.object(torch.distributed.tensor.DTensor, "full_tensor", side_effect=AssertionError):
        refused(FileExistsError, "exists; pass overwrite=True", lambda: export_gguf(model, file, is_main_process=main))
    before = file.read_bytes()
    write = gguf.GGUFWriter.write_tensor_data
    written: list[Any] = []

    def full_after_three(self: Any, tensor: Any) -> None:
        written.append(tensor)
        (write if len(written) < 4 else full_disk)(self, tensor)

    def again() -> None:
        export_gguf(model, file, overwrite=True, is_main_process=main)

    with patch.object(gguf.GGUFWriter, "write_tensor_data", full_after_three):
        refused(OSError, "model.gguf could not be written.*No space left", again)
    numbers = packed._stored_numbers
    with patch.object(packed, "_stored_numbers", lambda *given: numbers(*given) + 1):
        refused(RuntimeError, "read back are not those that were trained", again)
    assert file.read_bytes() == before
    assert {path.name for path in folder.iterdir()} == {"model.gguf"}


def exports_by_the_callback(folder: Path) -> None:
    """Under DDP, where nothing is gathered: the others would wait in what follows the training."""
    main = dist.get_rank() == 0
    callback = FourBitCallback(INT4, export=folder / "out")
    state = tf.TrainerState(is_world_process_zero=main)
    args = tf.TrainingArguments(str(folder), use_cpu=True, report_to=[])
    with patch.object(tf.modeling_utils, "safe_save_file", full_disk):
        model = convert_to_4bit(llama(), INT4)
        refused(OSError, "No space left", lambda: callback.on_train_end(args, state, tf.TrainerControl(), model))


class Unsendable(Exception):
    def __reduce__(self) -> Any:
        raise TypeError("never")


def blocks() -> None:
    main = dist.get_rank() == 0

    def fail(error: Exception, where: int = 0) -> None:
        with shared_errors(all_processes()) as meet:
            for step in range(3):
                meet()
                if main and step == where:
                    raise error

    refused(KeyError, "lost", lambda: fail(KeyError("lost")))
    refused(KeyError, "lost", lambda: fail(KeyError("lost"), where=2))
    refused(Unsendable if main else RuntimeError, "words", lambda: fail(Unsendable("words")))
    with shared_errors(all_processes()):
        pass
    # One process alone, which others cannot hear of in the operation that failed.
    with pytest.raises(torch.OutOfMemoryError), shared_errors(all_processes()):
        raise torch.OutOfMemoryError("no memory")
    dist.barrier()


def work(folder: Path) -> None:
    blocks()
    (folder / "gguf").mkdir(exist_ok=True)
    files_that_cannot_be_written(folder)
    exports_by_the_callback(folder)
    if HAS_GGUF:
        gguf_files(folder / "gguf")


@pytest.mark.slow
def test_every_process_raises_what_the_main_one_meets(tmp_path: Path) -> None:
    run_processes(2, work, tmp_path)


def of_a_mesh(folder: Path) -> None:
    """Where weights are replicated too, the others of a mesh hear of it by way of both of its dimensions."""
    mesh = init_device_mesh("cpu", (2, 2))
    tensors = [distribute_tensor(torch.ones(4), mesh, [Replicate(), Shard(0)]), torch.ones(4)]
    groups = groups_of(tensors)
    assert len(groups) == 2

    def fail() -> None:
        with shared_errors(groups):
            if dist.get_rank() == 0:
                raise KeyError("lost")

    refused(KeyError, "lost", fail)


@pytest.mark.slow
def test_all_of_a_mesh_raise_it(tmp_path: Path) -> None:
    run_processes(4, of_a_mesh, tmp_path)


def test_one_process_raises_what_it_meets() -> None:
    assert groups_of([torch.ones(2)]) == all_processes() == []

    def fail() -> None:
        with shared_errors([]) as meet:
            meet()
            raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        fail()
