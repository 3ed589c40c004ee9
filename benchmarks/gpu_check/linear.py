"""What a 4-bit linear layer costs, beside `nn.Linear`: eager, by kernel, compiled; and where the time goes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_check.common import DEVICE, Check, medians
from hf_stablespam.quant import FourBitConfig, FourBitLinear

FORMATS = {
    "int4 W4A4": FourBitConfig(),
    "int4 W4A4, no outliers": FourBitConfig(activation_outliers=0),
    "int4 W4": FourBitConfig(activation=None),
    "nvfp4 W4A4": FourBitConfig.nvfp4(),
    "mxfp4 W4A4": FourBitConfig("mxfp4", "mxfp4"),
}
BASE, COMPILED = "nn.Linear", "nn.Linear, compiled"
BOUND = 1.25  # times nn.Linear, compiled or with the kernel


def main(check: Check) -> None:
    """Forward and backward passes in bfloat16; rows for each size."""
    sizes = [(64, 8)] if check.rehearsal else [(size, 8192) for size in (4096, 2048, 1024)]
    for size, tokens in sizes:
        for name in list(FORMATS)[: 1 if check.rehearsal else None]:
            if check.seconds_left() < 0:
                check.row(check="linear", size=size, format=name, detail="not run: no time left")
                continue
            with check.trying(check="linear", size=size, format=name) as found:
                found["detail"] = measure(check, size, tokens, name)


def measure(check: Check, size: int, tokens: int, name: str) -> str:
    """Rows for one size and format, all ways in turn."""
    x, upstream = (torch.randn(tokens, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    backend = "eager" if check.rehearsal else "inductor"
    config = FORMATS[name]
    ways: dict[str, Any] = {BASE: plain(size), f"{name}, eager": layer(size, config)}
    if DEVICE == "cuda":  # elsewhere the option does nothing
        ways[f"{name}, Triton"] = layer(size, FourBitConfig.from_dict({**config.to_dict(), "fused": True}))
    ways[f"{name}, compiled"] = torch.compile(layer(size, config), backend=backend)
    ways[COMPILED] = torch.compile(plain(size), backend=backend)
    runs = {way: passes(module, x, upstream) for way, module in ways.items()}
    times = medians(runs, 2 if check.rehearsal else 20)
    for way, ms in times.items():
        base = times[COMPILED if "compiled" in way else BASE]
        check.row(check="linear", size=size, tokens=tokens, layer=way, ms=round(ms, 3), to_linear=round(ms / base, 3))
    if size == 4096 and name == "int4 W4A4":
        print(where_the_time_goes(runs[f"{name}, Triton"]))
    best = min(ms / times[BASE] for way, ms in times.items() if "Triton" in way or way == f"{name}, compiled")
    return f"best {best:.2f} x nn.Linear, bound {BOUND} {'holds' if best <= BOUND else 'MISSED'}"


def plain(size: int) -> nn.Linear:
    return nn.Linear(size, size, bias=False, device=DEVICE, dtype=torch.bfloat16)


def layer(size: int, config: FourBitConfig) -> FourBitLinear:
    return FourBitLinear(size, size, bias=False, config=config, device=DEVICE, dtype=torch.bfloat16)


def passes(module: Any, x: torch.Tensor, upstream: torch.Tensor) -> Any:
    leaf = x.clone().requires_grad_()

    def run() -> None:
        leaf.grad = None
        module.zero_grad()
        module(leaf).backward(upstream)

    return run


def where_the_time_goes(run: Any) -> str:
    """The kernels of ten rounds by their time."""
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(10):
            run()
        torch.cuda.synchronize()
    return recorded.key_averages().table(sort_by="self_cuda_time_total", row_limit=12)
