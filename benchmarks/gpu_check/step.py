"""What an optimizer step costs, beside fused AdamW and clipping with it: Llama shapes, bfloat16 and float32."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from benchmarks.gpu_check.common import DEVICE, Check, by_triton, medians, peak_gib, reset_peak
from benchmarks.llama_shapes import llama_shapes
from benchmarks.optimizer_step import BASE, CLIPPED, Contestant, state_bytes
from hf_stablespam.optim import StableSPAM

TRITON = "StableSPAM(triton)"
BOUND = 1.15  # times fused AdamW


def makers(options: dict[str, Any]) -> dict[str, tuple[Any, bool]]:
    """Optimizer factories by name, and whether gradients are clipped by their global norm first."""
    found: dict[str, tuple[Any, bool]] = {
        BASE: (lambda p: torch.optim.AdamW(p, fused=True), False),
        CLIPPED: (lambda p: torch.optim.AdamW(p, fused=True), True),
        TRITON: (lambda p: StableSPAM(p, **options), False),
        "StableSPAM(torch_ops)": (lambda p: StableSPAM(p, foreach=True), False),
    }
    if importlib.util.find_spec("torchao") is not None:
        found["StableSPAM(state_bits=8)"] = (lambda p: StableSPAM(p, state_bits=8), False)
    return found


def main(check: Check) -> None:
    """All sizes and dtypes; the contestants take turns, and each one's peak is that of one more step of its own."""
    sizes = ["tiny"] if check.rehearsal else ["350m", "1b"]
    for size in sizes:
        shapes = [(65, 8), (9,), (17, 5)] if size == "tiny" else llama_shapes(size)
        for dtype in (torch.bfloat16, torch.float32):
            with check.trying(check="step", size=size, dtype=str(dtype)) as found, by_triton() as options:
                found["detail"] = measure(check, size, shapes, dtype, options)


def measure(check: Check, size: str, shapes: list[tuple[int, ...]], dtype: torch.dtype, options: dict[str, Any]) -> str:
    """Rows for one size and dtype; what they come to."""
    reset_peak()
    generator = torch.Generator(DEVICE).manual_seed(0)
    row = [(torch.randn(shape, generator=generator, device=DEVICE) * 1e-3).to(dtype) for shape in shapes]
    contestants = {name: Contestant(make, shapes, [row], clip) for name, (make, clip) in makers(options).items()}
    repeats = 2 if check.rehearsal else 20
    times = medians({name: one.step for name, one in contestants.items()}, repeats)
    for name, one in contestants.items():
        reset_peak()
        before = peak_gib()
        one.step()
        extra = round(float(peak_gib()) - float(before), 3) if DEVICE == "cuda" else ""
        numbers = sum(grad.numel() for grad in row)
        check.row(
            check="step",
            size=size,
            dtype=str(dtype),
            optimizer=name,
            ms=round(times[name], 3),
            to_adamw=round(times[name] / times[BASE], 3),
            to_clipped_adamw=round(times[name] / times[CLIPPED], 3),
            extra_gib=extra,
            state_bytes_per_parameter=round(state_bytes(one) / numbers, 2),
        )
    ratio = times[TRITON] / times[BASE]
    return f"triton {ratio:.2f} x fused AdamW, bound {BOUND} {'holds' if ratio <= BOUND else 'MISSED'}"
