"""Run by test_fused.py in a process of its own, because Triton decides at import whether to interpret.

Prints one line for each combination in which the kernel and `quantizer.py` differ, the number of them all, and what
becomes of experts.
"""

from __future__ import annotations

import itertools
from unittest.mock import patch

import torch

from hf_stablespam.quant import FourBitConfig
from hf_stablespam.quant.formats import fused
from hf_stablespam.quant.formats.number_formats import FORMATS, ScaleKind
from hf_stablespam.quant.formats.quantizer import Quantizer, quantize
from hf_stablespam.quant.layers.expert_weights import quantize_experts
from hf_stablespam.quant.layers.matmul import Recipe


def quantizers():
    for name, format in FORMATS.items():
        for outliers, scale_dtype in itertools.product((0, 2), (None, torch.bfloat16, torch.float16)):
            if (format.zero_point and outliers) or (format.block and scale_dtype):
                continue
            for rule in ("floor", "even", "rceil") if name == "mxfp4" else ("even",):
                size = format.block or 32
                yield Quantizer(format, size, outliers=outliers, scale_dtype=scale_dtype, scale_rule=rule)


def inputs():
    for width, dtype in itertools.product((64, 75), (torch.float32, torch.bfloat16)):
        x = torch.randn(5, width) * torch.exp(torch.randn(5, width))
        x[1] = 0
        x[2, 3] = float("nan")
        x[3, 7] = float("inf")
        yield x.to(dtype)
    yield torch.randn(2, 3, 48)


def main() -> None:
    torch.manual_seed(0)
    count = 0
    for quantizer, x, own in itertools.product(quantizers(), inputs(), (False, True)):
        if not fused.covers(x, quantizer) or (own and quantizer.format.scale is not ScaleKind.E4M3):
            continue
        amax = None if own else x.nan_to_num(0, 0, 0).abs().amax()
        expected = quantize(x, quantizer, amax).dequantize().to(x.dtype)
        got = fused.fake_quantize(x, quantizer, amax)
        if not torch.equal(got.nan_to_num(-777.0), expected.nan_to_num(-777.0)):
            wrong = int((got.nan_to_num(-777.0) != expected.nan_to_num(-777.0)).sum())
            print("differs:", wrong, "numbers,", tuple(x.shape), x.dtype, quantizer)
        count += 1
    print("compared:", count)
    for name in ("int4", "mxfp4", "nvfp4"):
        compare_experts(FourBitConfig(name, None, group_size=32, fused=True))


def compare_experts(config: FourBitConfig) -> None:
    """Experts rounded as on a GPU, all at once, by the kernel where it covers them."""
    experts, recipe, original, calls = torch.randn(4, 8, 64), Recipe.of(config), fused.fake_quantize, []
    expected = quantize_experts(experts, recipe, experts.dtype, transposed=False)
    with (
        patch.object(torch.Tensor, "is_cuda", True),
        patch.object(fused, "fake_quantize", lambda *given: calls.append(given) or original(*given)),
    ):
        got = quantize_experts(experts, recipe, experts.dtype, transposed=False)
    print(config.weight, "experts:", torch.equal(got, expected), "kernels:", len(calls))


if __name__ == "__main__":
    main()
