"""Run by test_fused.py in a process of its own, because Triton decides at import whether to interpret.

Prints one line for each combination in which the kernel and `quantizer.py` differ, and last the number of them all.
"""

from __future__ import annotations

import itertools

import torch

from hf_stablespam.quant import fused
from hf_stablespam.quant.formats.number_formats import FORMATS
from hf_stablespam.quant.formats.quantizer import Quantizer, quantize


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
    for quantizer, x in itertools.product(quantizers(), inputs()):
        if not fused.covers(x, quantizer):
            continue
        amax = x.nan_to_num(0, 0, 0).abs().amax()
        expected = quantize(x, quantizer, amax).dequantize().to(x.dtype)
        got = fused.fake_quantize(x, quantizer, amax)
        if not torch.equal(got.nan_to_num(-777.0), expected.nan_to_num(-777.0)):
            wrong = int((got.nan_to_num(-777.0) != expected.nan_to_num(-777.0)).sum())
            print("differs:", wrong, "numbers,", tuple(x.shape), x.dtype, quantizer)
        count += 1
    print("compared:", count)


if __name__ == "__main__":
    main()
