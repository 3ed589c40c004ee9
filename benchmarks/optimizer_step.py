"""What one optimizer step costs: Stable-SPAM against fused AdamW, on tensors with the shapes of Llama models.

    python benchmarks/optimizer_step.py                     # all sizes, appended to results/optimizer_step.csv
    python benchmarks/optimizer_step.py --sizes 33m --dry-run --repeats 50
    python benchmarks/optimizer_step.py --device cuda --sizes 1b --dtype bfloat16

The optimizers take turns; p20, p50 and p80 of the step are given in milliseconds, and ratios of medians to fused
AdamW and to gradient clipping with fused AdamW, which is what the Trainer does by default. A fresh gradient comes
every step, so that AdaClip clips as it does in training. On a CPU with numba (extra `cpu`) Stable-SPAM also runs
without it. `--with-pytorch-optimizer` adds that package's StableSPAM, `--all-paths` AdamW by foreach, the loop, and
all parts off, `--relatives` SPAM, GaLore, 8- and 4-bit states, Lion, and `stabilize` in front of it.
GaLore's figures are those between two decompositions (one every 200 steps). `--fsdp` measures two processes of one
thread each instead, whose parameters are sharded as FSDP2 shards them.
"""

import argparse
import math
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks._record import append_rows, interleaved, quantile
from benchmarks.llama_shapes import SIZES, llama_shapes, width_of
from hf_stablespam.optim import SPAM, StableSPAM, stabilize
from hf_stablespam.optim.backends import numba_ops

BASE, CLIPPED = "AdamW(fused)", "clip_grad_norm_ + AdamW(fused)"
WRITES_GRADIENTS = {"pytorch_optimizer.StableSPAM"}  # into those that all share: it gets some of its own


class Contestant:
    """Parameters of their own, one optimizer, and gradients that all contestants share."""

    def __init__(self, make: Any, shapes: list[tuple[int, ...]], rows: list[list[torch.Tensor]], clip: bool) -> None:
        self.params = [torch.nn.Parameter(torch.full_like(grad, 0.02)) for grad in rows[0]]
        self.optimizer, self.rows, self.clip, self.turn = make(self.params), rows, clip, 0
        self.next_gradient()

    def next_gradient(self) -> None:
        for param, grad in zip(self.params, self.rows[self.turn % len(self.rows)], strict=True):
            param.grad = grad
        self.turn += 1

    def step(self) -> None:
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.params, 1e9)  # multiplies by 1: the cost without spoiling shared grads
        self.optimizer.step()
        self.next_gradient()


def without_numba(params: list[Any]) -> StableSPAM:
    """As where it is not installed."""
    return StableSPAM(params, foreach=True)


def has_numba(arguments: argparse.Namespace) -> bool:
    return arguments.device == "cpu" and numba_ops.load() is not None


def contestants(arguments: argparse.Namespace, rank: int) -> dict[str, tuple[Any, bool]]:
    """Optimizer factories by name, and whether gradients are clipped by their global norm first."""
    off = {"clip_beta": None, "norm_betas": None, "reset_interval": None}
    makers: dict[str, tuple[Any, bool]] = {
        BASE: (lambda p: torch.optim.AdamW(p, fused=True), False),
        CLIPPED: (lambda p: torch.optim.AdamW(p, fused=True), True),
        "StableSPAM": (StableSPAM, False),
        "stabilize(AdamW(fused))": (lambda p: stabilize(torch.optim.AdamW(p, fused=True)), False),
    }
    if has_numba(arguments):
        makers["StableSPAM(without numba)"] = (without_numba, False)
    if arguments.all_paths:
        makers["AdamW(foreach)"] = (lambda p: torch.optim.AdamW(p, foreach=True), False)
        makers["StableSPAM(loop)"] = (lambda p: StableSPAM(p, foreach=False, fused=False), False)
        makers["StableSPAM(all parts off)"] = (lambda p: StableSPAM(p, **off), False)
    if arguments.relatives:
        makers |= {name: (make, False) for name, make in relatives(rank).items()}
    if arguments.with_pytorch_optimizer:
        makers["pytorch_optimizer.StableSPAM"] = (_pytorch_optimizer(), False)
    return makers


def relatives(rank: int) -> dict[str, Any]:
    """Optimizer factories by name: what else this package has, and what it can stand in front of."""
    try:
        from bitsandbytes.optim import Lion
    except ImportError as error:
        raise SystemExit("--relatives needs bitsandbytes and torchao: pip install bitsandbytes torchao") from error

    def galore(params: list[Any], **options: Any) -> StableSPAM:
        groups = [{"params": params[1:-2], "rank": rank}, {"params": [params[0], *params[-2:]]}]
        return StableSPAM(groups, **options)

    return {
        "SPAM": SPAM,
        "SPAM density=0.25": lambda p: SPAM(p, density=0.25),
        "StableSPAM state_bits=8": lambda p: StableSPAM(p, state_bits=8),
        "StableSPAM state_bits=4": lambda p: StableSPAM(p, state_bits=4),
        "GaLore rank=hidden/4": lambda p: galore(p, clip_beta=None, norm_betas=None, reset_interval=None),
        "StableSPAM rank=hidden/4": galore,
        "Lion(bitsandbytes)": lambda p: Lion(p, lr=1e-4),
        "stabilize(Lion(bitsandbytes))": lambda p: stabilize(Lion(p, lr=1e-4)),
    }


def _pytorch_optimizer() -> Any:
    try:
        from pytorch_optimizer import StableSPAM as Theirs
    except ImportError as error:
        raise SystemExit("--with-pytorch-optimizer needs that package: pip install pytorch_optimizer") from error
    return Theirs


def peak_extra_bytes(contestant: Contestant, device: str) -> int:
    """The largest sum of temporaries alive during one step, from the allocator's own records."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=activities, profile_memory=True) as recorded:
        contestant.step()
    changes = [event.nbytes() for event in _memory_events(recorded)]
    alive = peak = 0
    for change in changes:
        alive += change
        peak = max(peak, alive)
    return peak


def _memory_events(recorded: profile) -> list[Any]:
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    return sorted(events, key=lambda event: event.start_ns())


def state_bytes(contestant: Contestant) -> int:
    """Bytes of every tensor in the optimizer's state, and of the trackers in front of one that is stabilised."""
    optimizer = contestant.optimizer
    states = [*optimizer.state.values(), *getattr(getattr(optimizer, "stabilizer", None), "_trackers", {}).values()]
    tensors = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(part.nbytes for value in tensors for part in stored_parts(value))


def stored_parts(value: torch.Tensor) -> list[torch.Tensor]:
    """What a tensor keeps: itself, or codes and scales where it keeps those (its table of levels is shared)."""
    return [value.codes, value.scale] if hasattr(value, "codes") else [value]


def measure(size: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows for one model size."""
    shapes, dtype = llama_shapes(size), getattr(torch, arguments.dtype)
    generator = torch.Generator(arguments.device).manual_seed(0)
    options = {"generator": generator, "device": arguments.device}
    rows = [[(torch.randn(s, **options) * 1e-3).to(dtype) for s in shapes] for _ in range(arguments.gradients)]
    makers = contestants(arguments, rank=width_of(size) // 4)
    if arguments.only:
        makers = {name: makers[name] for name in (BASE, *arguments.only)}
    own = [[grad.clone() for grad in row] for row in rows] if WRITES_GRADIENTS & set(makers) else []
    all_of_them = {
        name: Contestant(make, shapes, own if name in WRITES_GRADIENTS else rows, clip)
        for name, (make, clip) in makers.items()
    }
    seconds = interleaved({name: one.step for name, one in all_of_them.items()}, arguments.repeats)
    numbers = sum(grad.numel() for grad in rows[0])
    return [
        {
            **row,
            "state_bytes_per_parameter": round(state_bytes(all_of_them[name]) / numbers, 3),
            "peak_extra_bytes": peak_extra_bytes(all_of_them[name], arguments.device),
            "largest_tensor_bytes": max(grad.nbytes for grad in rows[0]),
        }
        for name, row in timings(seconds, arguments, shapes).items()
    ]


def timings(
    seconds: dict[str, list[float]], arguments: argparse.Namespace, shapes: list[tuple[int, ...]]
) -> dict[str, dict[str, Any]]:
    """A row by the name of each optimizer, from its sorted seconds."""
    medians = {name: quantile(values, 0.5) for name, values in seconds.items()}
    return {
        name: {
            "device": arguments.device,
            "dtype": arguments.dtype,
            "parameters": sum(math.prod(shape) for shape in shapes),
            "tensors": len(shapes),
            "optimizer": name,
            "p20_ms": round(quantile(values, 0.2) * 1e3, 2),
            "p50_ms": round(medians[name] * 1e3, 2),
            "p80_ms": round(quantile(values, 0.8) * 1e3, 2),
            "steps_per_second": round(1 / medians[name], 2),
            "to_adamw": round(medians[name] / medians[BASE], 3),
            "to_clipped_adamw": round(medians[name] / medians[CLIPPED], 3) if CLIPPED in medians else "",
            "repeats": len(values),
            "numba": version("numba") if has_numba(arguments) else "",
            "processes": 2 if arguments.fsdp else 1,
        }
        for name, values in seconds.items()
    }


def report(size: str, rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Print rows, and append them."""
    for row in rows:
        times = f"{row['p20_ms']:9.2f} {row['p50_ms']:9.2f} {row['p80_ms']:9.2f} ms"
        memory = ""
        if "peak_extra_bytes" in row:
            peak = row["peak_extra_bytes"] / 1e6
            memory = f"{row['state_bytes_per_parameter']:.3f} B/param, peak {peak:.1f} MB"
        print(f"{size:>5} {row['optimizer']:32s}{times}  x{row['to_adamw']:.2f} (x{row['to_clipped_adamw']})  {memory}")
    if not arguments.dry_run:
        append_rows("optimizer_step", rows)


def measure_sharded(rank: int, size: str, arguments: argparse.Namespace, store: str) -> None:
    """One of two processes: rows for parameters that are sharded over both; only optimizers that need no more."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh, shapes, dtype = init_device_mesh("cpu", (2,)), llama_shapes(size), getattr(torch, arguments.dtype)
    generator = torch.Generator().manual_seed(0)

    def sharded(shape: tuple[int, ...]) -> torch.Tensor:
        whole = (torch.randn(shape, generator=generator) * 1e-3).to(dtype)
        return distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)

    rows = [[sharded(shape) for shape in shapes] for _ in range(arguments.gradients)]
    makers = {name: make for name, (make, _) in contestants(arguments, 0).items() if name in (BASE, "StableSPAM")}
    runs = {name: Contestant(make, shapes, rows, clip=False) for name, make in makers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(arguments.repeats + 3):
        for name, run in runs.items():
            dist.barrier()
            start = time.perf_counter()
            run.step()
            dist.barrier()
            if repeat >= 3:
                seconds[name].append(time.perf_counter() - start)
    dist.destroy_process_group()
    if rank == 0:
        found = timings({name: sorted(values) for name, values in seconds.items()}, arguments, shapes)
        report(size, list(found.values()), arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["4m", "33m", "130m"], choices=SIZES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--gradients", type=int, default=3, help="different gradients that take turns")
    parser.add_argument("--threads", type=int, help="threads of PyTorch on the CPU")
    parser.add_argument("--all-paths", action="store_true", help="the foreach and loop paths too")
    parser.add_argument("--relatives", action="store_true", help="the other optimizers and states of this package")
    parser.add_argument("--with-pytorch-optimizer", action="store_true")
    parser.add_argument("--fsdp", action="store_true", help="two processes, AdamW and StableSPAM on sharded tensors")
    parser.add_argument("--only", nargs="+", help="names of optimizers; fused AdamW is always among them")
    parser.add_argument("--dry-run", action="store_true", help="print, and append nothing")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    for size in arguments.sizes:
        if arguments.fsdp:
            with tempfile.TemporaryDirectory() as folder:
                torch.multiprocessing.spawn(measure_sharded, (size, arguments, f"{folder}/store"), nprocs=2)
        else:
            report(size, measure(size, arguments), arguments)


if __name__ == "__main__":
    main()
