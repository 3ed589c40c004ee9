"""Run by test_fused.py: compile the kernel to machine code of an NVIDIA GPU of compute capability 9.0."""

from __future__ import annotations

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hf_stablespam.quant import fused
from hf_stablespam.quant.formats.number_formats import FORMATS, ScaleKind


def main() -> None:
    for name in ("int4", "int4_asym", "mxfp4", "nvfp4"):
        format = FORMATS[name]
        size = format.block or 64
        real = format.scale is ScaleKind.REAL
        constants = {
            **{"SIZE": size, "PADDED": size, "BLOCK": 16, "MODE": fused.SCALE_MODES[format.scale], "RULE": 1},
            **{"FLOATING": format.floating, "ZERO_POINT": format.zero_point, "LOWEST": float(format.lowest)},
            **{"HIGHEST": float(format.highest), "ANCHOR": float(format.anchor), "MIN_SCALE": 2.0**-126},
            **{"DIVIDE": real and not format.zero_point, "SCALE_BITS": int(format.zero_point)},
            **{"OUTLIERS": 2 if name == "int4" else 0},
        }
        signature = {"x_pointer": "*bf16", "out_pointer": "*bf16", "whole_pointer": "*fp32"}
        signature |= {"groups": "i32", "groups_per_row": "i32", "width": "i32"}
        signature |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(fused._fake_quantize, signature=signature, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        print(name, len(compiled.asm["cubin"]))


if __name__ == "__main__":
    main()
