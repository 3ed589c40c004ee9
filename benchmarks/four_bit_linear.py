"""What a 4-bit linear layer costs and how well it computes, beside `nn.Linear`, torchao's and fouroversix's layers.

    python benchmarks/four_bit_linear.py                          # appended to results/four_bit_linear.csv
    python benchmarks/four_bit_linear.py --sizes 1024 --repeats 5 --dry-run
    python benchmarks/four_bit_linear.py --device cuda --dtype bfloat16 --tokens 8192 --sizes 1024 4096 --fused

One round is an optimizer step of `accumulate` forward and backward passes. The layers take turns; p20 and p50 of a
round are given, per micro-batch, and their ratios to `nn.Linear`; forward_ms is a forward pass, forward_kept_ms one
that finds its weight rounded (`fixed_weights`). The quality columns are signal-to-noise ratios in dB (higher is
better), against the products of unquantized operands: of the output, of the input's gradient and of the weight's
gradient, on normal numbers. On a busy machine `--clock cpu --threads 1` counts the processor's seconds instead of the
wall clock's. fouroversix is measured where it is installed; its backward pass needs CUDA, so that on a CPU its row is
the forward pass alone, to be read beside the column forward_ms.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks._record import append_rows, interleaved, quantile
from hf_stablespam.quant import FourBitConfig, FourBitLinear

BASE = "nn.Linear"
CONFIGS: dict[str, FourBitConfig] = {
    "int4 W4A4": FourBitConfig(),
    "int4 W4A4, no outliers": FourBitConfig(activation_outliers=0),
    "int4_asym W4A4": FourBitConfig("int4_asym"),
    "paper int4 W4A4": FourBitConfig.paper("int4"),
    "mxfp4 W4A4": FourBitConfig("mxfp4", "mxfp4"),
    "nvfp4 W4A4": FourBitConfig.nvfp4(),
    "nvfp4 W4A4, 4 or 6": FourBitConfig("nvfp4", "nvfp4", four_over_six=True),
    "nvfp4 W4A4G4": FourBitConfig.nvfp4(gradient=True),
    "int4 W4": FourBitConfig(activation=None),
    "nvfp4 W4": FourBitConfig("nvfp4", None),
}
WEIGHT_ONLY = ("int4 W4", "nvfp4 W4")


class Contestant:
    """A layer, and what a round with it does."""

    def __init__(self, layer: nn.Module, x: Tensor, upstream: Tensor, accumulate: int, backward: bool = True) -> None:
        self.layer, self.x, self.upstream = layer, x.clone().requires_grad_(backward), upstream
        self.accumulate, self.backward = accumulate, backward

    def forward(self) -> Tensor:
        return self.layer(self.x)

    def forward_kept(self) -> Tensor:
        """A forward pass with the weight that an earlier one rounded, as in a `fixed_weights` block."""
        if isinstance(self.layer, FourBitLinear) and self.layer.recipe.weight is not None:
            self.layer._fixed = 1
        try:
            return self.forward()
        finally:
            self.layer._fixed = 0  # `_kept` stays

    def round(self) -> None:
        self.x.grad = None
        self.layer.zero_grad()
        for _ in range(self.accumulate):
            if self.backward:
                self.forward().backward(self.upstream)
            else:
                with torch.no_grad():
                    self.forward()

    def quality(self) -> dict[str, Any]:
        """Signal-to-noise ratios of the three products."""
        self.accumulate = 1
        with torch.no_grad():
            result = {"output_db": _decibel(self.x @ self.layer.weight.T, self.forward())}
        if self.backward:
            self.round()
            exact_x, exact_weight = self.upstream @ self.layer.weight, self.upstream.T @ self.x
            result["input_grad_db"] = _decibel(exact_x, self.x.grad)
            result["weight_grad_db"] = _decibel(exact_weight, self.layer.weight.grad)
        return result


def _decibel(exact: Tensor, got: Tensor | None) -> float | str:
    assert got is not None
    noise = (exact.detach().double() - got.detach().double()).square().sum()
    ratio = exact.detach().double().square().sum() / noise
    return round(float(10 * torch.log10(ratio)), 2) if float(ratio) < 1e9 else ""


def layers(size: int, arguments: argparse.Namespace) -> dict[str, tuple[nn.Module, bool]]:
    """Every layer with the same weight, and whether its backward pass runs here."""
    options = {"device": arguments.device, "dtype": getattr(torch, arguments.dtype)}
    base = nn.Linear(size, size, bias=False, **options)
    found: dict[str, tuple[nn.Module, bool]] = {BASE: (base, True)}
    names = WEIGHT_ONLY if arguments.accumulate > 1 else CONFIGS
    for name in names:
        config = CONFIGS[name]
        if arguments.fused:
            config = FourBitConfig.from_dict({**config.to_dict(), "fused": True})
        found[name] = (FourBitLinear(size, size, bias=False, config=config, **options), True)
    if arguments.accumulate == 1:
        found.update(_torchao(base))
        found.update(_fouroversix(base, arguments.device))
    if arguments.only:
        chosen = [name for name in found if name == BASE or any(part in name for part in arguments.only)]
        found = {name: found[name] for name in chosen}
    for layer, _ in found.values():
        layer.weight = nn.Parameter(base.weight.detach().clone())
        if isinstance(layer, FourBitLinear):
            layer.configure(layer.four_bit)
    return found


def _torchao(base: nn.Linear) -> dict[str, tuple[nn.Module, bool]]:
    """Its layer for quantization-aware training; those for NVFP4 and MXFP4 need a Blackwell GPU."""
    if importlib.util.find_spec("torchao") is None or base.in_features % 128:
        return {}
    from torchao.quantization.qat import IntxFakeQuantizeConfig
    from torchao.quantization.qat.linear import FakeQuantizedLinear

    weight = IntxFakeQuantizeConfig(torch.int4, group_size=128)
    activation = IntxFakeQuantizeConfig(torch.int4, "per_token", is_symmetric=False)
    return {"torchao int4 W4A4 (per token)": (FakeQuantizedLinear.from_linear(base, activation, weight), True)}


def _fouroversix(base: nn.Linear, device: str) -> dict[str, tuple[nn.Module, bool]]:
    if importlib.util.find_spec("fouroversix") is None:
        return {}
    from fouroversix import ModuleQuantizationConfig
    from fouroversix.model.modules.linear import FourOverSixLinear

    config = ModuleQuantizationConfig(keep_master_weights=True)
    return {"fouroversix nvfp4 W4A4G4": (FourOverSixLinear(base, config), device == "cuda")}


def timed(runs: dict[str, Any], repeats: int, clock: str) -> dict[str, list[float]]:
    """Sorted seconds of each run; the runs take turns."""
    if clock == "wall":
        return interleaved(runs, repeats)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(2 + repeats):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if repeat >= 2:
                seconds[name].append(time.process_time() - start)
    return {name: sorted(values) for name, values in seconds.items()}


def measure(size: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows for one size."""
    torch.manual_seed(0)
    options = {"device": arguments.device, "dtype": getattr(torch, arguments.dtype)}
    x, upstream = torch.randn(arguments.tokens, size, **options), torch.randn(arguments.tokens, size, **options)
    load = os.getloadavg()[0]
    contestants = {
        name: Contestant(layer, x, upstream, arguments.accumulate, backward)
        for name, (layer, backward) in layers(size, arguments).items()
    }
    seconds = timed({name: one.round for name, one in contestants.items()}, arguments.repeats, arguments.clock)
    passes = {name: one.forward for name, one in contestants.items()}
    passes |= {f"{name} kept": one.forward_kept for name, one in contestants.items()}
    forward = timed(passes, arguments.repeats, arguments.clock)
    rows = []
    for name, values in seconds.items():
        both = contestants[name].backward
        low, middle = quantile(values, 0.2), quantile(values, 0.5)
        rows.append(
            {
                **{"device": arguments.device, "dtype": arguments.dtype, "tokens": arguments.tokens, "size": size},
                **{"accumulate": arguments.accumulate, "clock": arguments.clock, "layer": name},
                "p20_ms": round(low * 1e3 / arguments.accumulate, 2) if both else "",
                "p50_ms": round(middle * 1e3 / arguments.accumulate, 2) if both else "",
                "p20_to_linear": round(low / quantile(seconds[BASE], 0.2), 3) if both else "",
                "p50_to_linear": round(middle / quantile(seconds[BASE], 0.5), 3) if both else "",
                "forward_ms": round(quantile(forward[name], 0.2) * 1e3, 2),
                "forward_kept_ms": round(quantile(forward[f"{name} kept"], 0.2) * 1e3, 2),
                "output_db": "",
                "input_grad_db": "",
                "weight_grad_db": "",
                **contestants[name].quality(),
                "repeats": len(values),
                "load_average": round(load, 1),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=int, default=[1024, 2048])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches per optimizer step")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch on the CPU")
    parser.add_argument("--only", nargs="+", help="layers whose names hold one of these")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"])
    parser.add_argument("--fused", action="store_true", help="the Triton kernel (GPU)")
    parser.add_argument("--dry-run", action="store_true", help="print, and append nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for size in arguments.sizes:
        rows = measure(size, arguments)
        for row in rows:
            ratio = f"x{row['p20_to_linear']} (p50 x{row['p50_to_linear']})"
            ratio += f"forward {row['forward_ms']} ms ({row['forward_kept_ms']})"
            quality = f"{row['output_db']} / {row['input_grad_db']} / {row['weight_grad_db']} dB"
            print(f"{size:>5} {row['layer']:32s} {row['p20_ms']!s:>8} ms  {ratio:50s} {quality}")
        if not arguments.dry_run:
            append_rows("four_bit_linear", rows)


if __name__ == "__main__":
    main()
