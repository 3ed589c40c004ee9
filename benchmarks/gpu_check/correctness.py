"""Every Triton kernel against the references, no synchronisation in a step, CUDA graphs, `torch.compile`."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_check.common import DEVICE, Check, by_triton, synchronize
from hf_stablespam.optim import StableSPAM
from hf_stablespam.quant import FourBitConfig, FourBitLinear
from hf_stablespam.quant.formats.number_formats import FORMATS
from hf_stablespam.quant.formats.quantizer import quantize

ROOT = Path(__file__).parents[2]
# Against the reference loop in the same dtype after some steps with lr 1e-2.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def main(check: Check) -> None:
    """All checks, the most important first."""
    check_tests(check)
    check_fake_quantizer(check)
    check_many_tensors(check)
    check_other_device(check)
    check_no_synchronisation(check)
    check_graph(check)
    check_compiled(check)


def check_tests(check: Check) -> None:
    """The tests that take the kernels of the step, and those that are skipped for want of a GPU."""
    files = ["tests/optim/test_triton.py"]
    if DEVICE == "cuda":
        files += ["tests/quant/formats/test_fused.py", "tests/quant/layers/test_experts.py"]
    wanted = ["-k", "bad or extremes"] if check.rehearsal else []
    for file in files:
        with check.trying(check=f"pytest {file}") as found:
            command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file, *wanted]
            limit = max(5.0, check.seconds_left())
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False)
            print(done.stdout[-4000:], done.stderr[-2000:])
            lines = [line for line in done.stdout.splitlines() if " passed" in line or " failed" in line]
            found.update(passed=int(done.returncode == 0), detail=lines[-1].strip("= ") if lines else "no tests ran")


def check_fake_quantizer(check: Check) -> None:
    """Each format, rounding of scales, width and dtype: bit for bit the readable quantizer."""
    from hf_stablespam.quant import fused
    from tests.quant.formats.fused_in_interpreter import inputs, quantizers

    with check.trying(check="fake quantizer, every format and dtype") as found:
        torch.manual_seed(0)
        wrong, count = [], 0
        pairs = [
            (quantizer, x) for quantizer, x in itertools.product(quantizers(), inputs()) if fused.covers(x, quantizer)
        ]
        for quantizer, x in pairs[:: 23 if check.rehearsal else 1]:
            amax = x.nan_to_num(0, 0, 0).abs().amax()
            expected = quantize(x, quantizer, amax).dequantize().to(x.dtype)
            got = fused.fake_quantize(x.to(DEVICE), quantizer, amax.to(DEVICE)).cpu()
            count += 1
            if not torch.equal(got.nan_to_num(-777.0), expected.nan_to_num(-777.0)):
                wrong.append(f"{quantizer.format.name} {tuple(x.shape)} {x.dtype}")
        found.update(passed=int(not wrong), detail=f"{len(wrong)} of {count} differ {sorted(set(wrong))[:5]}")


def many_parameters(count: int, dtype: torch.dtype, device: str) -> list[nn.Parameter]:
    """Tensors of sizes from one to some thousand entries."""
    generator = torch.Generator().manual_seed(0)
    sizes = [1 + (index * 37) % 97 for index in range(count)]
    shapes = [(size, 1 + size % 5 * 31) for size in sizes]
    return [nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in shapes]


def rows_for(params: list[nn.Parameter], steps: int) -> list[list[Tensor]]:
    """Gradients, with a spike, a non-finite one and zeros among them."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for step in range(steps):
        row = [torch.randn(p.shape, generator=generator) * 0.01 for p in params]
        row[step % len(row)].view(-1)[0] = 50.0
        row[(step + 1) % len(row)].view(-1)[0] = torch.inf if step == 2 else 0.0
        row[(step + 2) % len(row)].zero_()
        rows.append([grad.to(p.device, p.dtype) for grad, p in zip(row, params, strict=True)])
    return rows


def train(params: list[nn.Parameter], rows: list[list[Tensor]], **options: Any) -> StableSPAM:
    optimizer = StableSPAM(params, lr=1e-2, weight_decay=0.1, reset_interval=3, **options)
    for row in rows:
        for param, grad in zip(params, row, strict=True):
            param.grad = grad.clone()
        optimizer.step()
    return optimizer


def check_many_tensors(check: Check) -> None:
    """300 tensors of mixed sizes in one launch, against the loop; and the multi-tensor backend."""
    count = 6 if check.rehearsal else 300
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        reference = many_parameters(count, dtype, DEVICE)
        rows = rows_for(reference, 5)
        train(reference, rows, foreach=False, fused=False, state_dtype=torch.float32)
        for name in ("triton", "torch_ops"):
            with check.trying(check=f"{count} tensors, {name}", dtype=str(dtype)) as found:
                params = many_parameters(count, dtype, DEVICE)
                if name == "triton":
                    with by_triton() as options:
                        train(params, rows, state_dtype=torch.float32, **options)
                else:
                    train(params, rows, foreach=True, state_dtype=torch.float32)
                pairs = zip(params, reference, strict=True)
                worst = max(float((one.double() - other.double()).abs().max()) for one, other in pairs)
                # The interpreter cuts a bfloat16 off where a GPU rounds it.
                tolerance = TOLERANCE[dtype] * (10 if check.rehearsal and dtype == torch.bfloat16 else 1)
                found.update(passed=int(worst <= tolerance), detail=f"largest difference {worst:.2e}")


def check_other_device(check: Check) -> None:
    """Tensors on another GPU than the current one."""
    if torch.cuda.device_count() < 2:
        check.row(check="another device index", passed="", detail=f"not run: {torch.cuda.device_count()} GPUs")
        return
    with check.trying(check="another device index") as found, by_triton() as options:
        results = []
        for device in ("cuda:0", "cuda:1"):
            params = many_parameters(20, torch.float32, device)
            train(params, rows_for(params, 3), **options)
            results.append([param.detach().cpu() for param in params])
        found.update(passed=int(all(map(torch.equal, *results))), detail="current device cuda:0")


def check_no_synchronisation(check: Check) -> None:
    """A step reads nothing back to the host."""
    if DEVICE != "cuda":
        check.row(check="no synchronisation in a step", passed="", detail="not run: no GPU")
        return
    for name, options in {"triton": {"fused": True}, "torch_ops": {"foreach": True}}.items():
        with check.trying(check="no synchronisation in a step", backend=name):
            params = many_parameters(50, torch.bfloat16, DEVICE)
            rows = rows_for(params, 4)
            optimizer = train(params, rows[:2], **options)
            synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                for row in rows[2:]:
                    for param, grad in zip(params, row, strict=True):
                        param.grad = grad
                    optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")


def check_graph(check: Check) -> None:
    """A captured step, replayed, is that of every day."""
    if DEVICE != "cuda":
        check.row(check="CUDA graph of a step", passed="", detail="not run: no GPU")
        return
    for name, options in {"triton": {"fused": True}, "torch_ops": {"foreach": True}}.items():
        with check.trying(check="CUDA graph of a step", backend=name) as found:
            params, twins = (many_parameters(50, torch.float32, DEVICE) for _ in range(2))
            rows = rows_for(params, 6)
            train(twins, rows, **options)
            static = [grad.clone() for grad in rows[0]]
            optimizer = StableSPAM(params, lr=1e-2, weight_decay=0.1, reset_interval=3, **options)
            for param, grad in zip(params, static, strict=True):
                param.grad = grad
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for row in rows[:3]:  # warm up
                    torch._foreach_copy_(static, row)
                    optimizer.step()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
            for row in rows[3:]:
                torch._foreach_copy_(static, row)
                graph.replay()
            worst = max(float((one - other).abs().max()) for one, other in zip(params, twins, strict=True))
            found.update(passed=int(worst <= 1e-6), detail=f"largest difference {worst:.2e} after 6 steps")


def check_compiled(check: Check) -> None:
    """A compiled step and compiled 4-bit layers give what eager ones do."""
    backend = "eager" if check.rehearsal else "inductor"
    with check.trying(check="torch.compile of a step", backend=backend) as found:
        count = 1 if check.rehearsal else 3  # a tensor takes the compiler seconds
        params, twins = (many_parameters(count, torch.float32, DEVICE) for _ in range(2))
        rows = rows_for(params, 3)
        train(twins, rows)
        optimizer = StableSPAM(params, lr=1e-2, weight_decay=0.1, reset_interval=3)
        step = torch.compile(optimizer.step, backend=backend)
        for row in rows:
            for param, grad in zip(params, row, strict=True):
                param.grad = grad.clone()
            step()
        worst = max(float((one - other).abs().max()) for one, other in zip(params, twins, strict=True))
        found.update(passed=int(worst <= 1e-5), detail=f"largest difference {worst:.2e}")
    names = ["int4"] if check.rehearsal else [name for name, format in FORMATS.items() if format.packing]
    for name in names:
        with check.trying(check="compiled 4-bit layer", format=name) as found:
            torch.manual_seed(0)
            layer = FourBitLinear(128, 64, config=FourBitConfig(weight=name, activation=None), device=DEVICE)
            identity = torch.eye(128, device=DEVICE)  # the product is the weight
            compiled = torch.compile(layer, backend=backend)(identity)
            equal = float((compiled == layer(identity)).float().mean())
            found.update(passed=int(equal == 1), detail=f"{equal:.1%} of the weights equal")
