"""4-bit layers under DDP and FSDP2: two gloo processes train as one does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hf_stablespam.quant import FourBitConfig, FourBitLinear, convert_to_4bit
from tests.processes import run_processes

STEPS = 3
KINDS = ("ddp", "fsdp2")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.v_proj(torch.tanh(self.q_proj(x) * self.k_proj(x)))


def make() -> nn.Module:
    torch.manual_seed(0)
    # Rows are quantized by themselves, so that a batch may be split without changing a code.
    return convert_to_4bit(nn.Sequential(Block(), Block()), FourBitConfig("nvfp4", "int4", group_size=16))


def train(model: nn.Module, rows: slice) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    batch = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))[rows]
    for _ in range(STEPS):
        for _ in range(2):  # gradients are accumulated
            model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def work(folder: Path) -> None:
    for kind in KINDS:
        train_as(kind, folder / f"{kind}.pt")


def train_as(kind: str, file: Path) -> None:
    rank = dist.get_rank()
    model = make()
    if kind == "ddp":
        model = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (2,))
        for block in model:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    inner = model.module if kind == "ddp" else model
    saves = []
    for module in inner.modules():
        if isinstance(module, FourBitLinear):
            module.register_forward_hook(lambda layer, *_: saves.append(layer._saves_weight()))
    train(model, slice(4 * rank, 4 * rank + 4))
    # Gathered weights are freed until the backward pass: a 4-bit copy of them must not stay behind.
    assert set(saves) == {kind == "ddp"}
    state = {
        key: getattr(value, "full_tensor", lambda value=value: value)() for key, value in inner.state_dict().items()
    }
    if rank == 0:
        torch.save(state, file)
    dist.barrier()


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    run_processes(2, work, tmp_path)
    reference = make()
    train(reference, slice(0, 8))
    for kind in KINDS:
        state = torch.load(tmp_path / f"{kind}.pt")
        assert list(state) == list(reference.state_dict())
        for key, value in reference.state_dict().items():
            torch.testing.assert_close(state[key], value, rtol=1e-4, atol=1e-6)
