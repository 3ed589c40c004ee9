"""Several gloo processes on the CPU, for the tests of what is distributed.

They are forked from a server that has imported the large libraries and nothing of ours, and has run nothing: importing
the Trainer anew takes each process ten seconds, more than most tests of it.
"""

import gc
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import dedent

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from filelock import FileLock

TIMEOUT = timedelta(minutes=3)
FORKSERVER = multiprocessing.get_context("forkserver")  # one for all tests of a worker
FORKSERVER.set_forkserver_preload(
    ["torch.distributed.fsdp", "torch.distributed.tensor", "torch._dynamo", "transformers.trainer", "peft"]
)


def run_processes(world_size: int, function: Callable[..., None], *arguments: object) -> None:
    """Call `function(*arguments)` in `world_size` new processes that know of each other as under torchrun.

    The function must be importable; an error in any process is raised here, with its traceback.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    given = (world_size, port, dict(os.environ), function, arguments)
    mp.start_processes(_process, given, nprocs=world_size, start_method="forkserver")


def _process(
    rank: int, world_size: int, port: int, environment: dict, function: Callable[..., None], arguments: tuple
) -> None:
    gc.freeze()  # what has been imported, as in conftest.py
    torch.set_num_threads(1)
    torch.manual_seed(0)
    os.environ.update(
        environment,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    dist.init_process_group("gloo", timeout=TIMEOUT)
    try:
        function(*arguments)
    finally:
        dist.destroy_process_group()
    # The work is done, and has raised nothing. Without the interpreter's own end, where threads of libraries that are
    # still at work (gloo's, wandb's) now and then abort the process.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run_code(code: str, *arguments: object) -> tuple[str, str]:
    """What `code` writes to stdout and stderr in a new process, with `arguments` in `sys.argv[1:]`.

    There transformers has been imported, and nothing of ours: for what other tests must not have touched.
    """
    with TemporaryDirectory() as folder:
        given = (dedent(code), [str(argument) for argument in arguments], dict(os.environ), folder)
        process = FORKSERVER.Process(target=_execute, args=given)
        process.start()
        process.join(TIMEOUT.total_seconds())
        written, errors = ((Path(folder) / name).read_text() for name in STREAMS)
    assert process.exitcode == 0, errors
    return written, errors


def run_module(module: str, *arguments: object) -> tuple[str, str]:
    """What `python -m module *arguments` writes to stdout and stderr, in such a process."""
    code = f"""
        import runpy, sys
        sys.path.insert(0, "")
        runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
    """
    return run_code(code, *arguments)


STREAMS = ("stdout", "stderr")


def _execute(code: str, arguments: list[str], environment: dict, folder: str) -> None:
    gc.freeze()
    os.environ.update(environment)
    for descriptor, name in enumerate(STREAMS, start=1):
        os.dup2(os.open(Path(folder) / name, os.O_WRONLY | os.O_CREAT), descriptor)
    sys.argv[1:] = arguments
    exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})


def run_once(factory: pytest.TempPathFactory, name: str, function: Callable[[Path], None]) -> Path:
    """Call `function(folder)` once, also where several pytest workers ask for the same; returns the folder."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            function(folder)
    return folder
