"""What 4-bit experts cost beside transformers' own, forward and backward, in each implementation.

    python benchmarks/experts.py                               # rows in results/experts.csv
    python benchmarks/experts.py --experts 64 --tokens 4 --implementations grouped_mm --round-all
    python benchmarks/experts.py --experts 8 --tokens 64 --repeats 3 --dry-run

One block of experts of a Qwen3-MoE, two experts for a token. Blocks take turns; the median is given, in
processor time of one thread, so that other load disturbs little. The weights are
rounded anew in each pass, as in training. `peak_weights` is the most memory that a pass holds at once beyond
parameters and gradients, in units of the block's weights, so that one rounded copy is 1; an unconverted block's are
its activations. With few tokens (`--tokens 4`) most experts get none, and only the others are rounded, unless
`--round-all` asks for all.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks._record import append_rows, quantile
from hf_stablespam import FourBitConfig, convert_to_4bit
from hf_stablespam.quant.layers import experts as layer
from hf_stablespam.quant.layers.experts import is_experts, weight_names

TOP_K = 2
Key = tuple[str, str]  # implementation and name of the configuration
CONFIGS = {
    "plain": None,
    "int4 W4": FourBitConfig(activation=None, group_size=32),
    "int4 W4A4": FourBitConfig(group_size=32),
    "int4 W4A4, nothing kept": FourBitConfig(group_size=32, cache_weights=False),
}


class Pass:
    """Forward and backward of one block of experts."""

    def __init__(
        self, config: FourBitConfig | None, implementation: str, experts: int, width: int, tokens: int
    ) -> None:
        torch.manual_seed(0)
        shape = {"vocab_size": 8, "hidden_size": width, "moe_intermediate_size": width, "num_hidden_layers": 1}
        options = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts": experts}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **shape, **options))
        model.set_experts_implementation(implementation)
        if config is not None:
            convert_to_4bit(model, config)
        self.block: nn.Module = next(module for module in model.modules() if is_experts(module))
        self.x = torch.randn(tokens, width, requires_grad=True)
        self.index = torch.stack([torch.randperm(experts)[:TOP_K] for _ in range(tokens)])
        self.weights = torch.full(self.index.shape, 1 / TOP_K)

    def __call__(self) -> None:
        self.block(self.x, self.index, self.weights).sum().backward()

    def peak_weights(self) -> float:
        """See the module's description."""
        weights: list[Tensor] = [getattr(self.block, name) for name in weight_names(self.block)]
        self()  # so that gradients are there
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            self()
        changes = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
        held = peak = 0
        for event in sorted(changes, key=lambda event: event.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
        return peak / sum(weight.numel() * weight.element_size() for weight in weights)


def processor_time(passes: dict[Key, Pass], repeats: int) -> dict[Key, list[float]]:
    """Seconds of one thread of each pass, sorted; the first ones do not count."""
    seconds: dict[Key, list[float]] = {key: [] for key in passes}
    for repeat in range(repeats + 1):
        for key, one in passes.items():
            start = time.process_time()
            one()
            if repeat:
                seconds[key].append(time.process_time() - start)
    return {key: sorted(values) for key, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4, 512])
    parser.add_argument("--width", type=int, default=256, help="of hidden states and inside of an expert")
    parser.add_argument("--implementations", nargs="+", default=["grouped_mm", "eager"], help="batched_mm is slow")
    parser.add_argument("--round-all", action="store_true", help="experts without a token too (not with eager)")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--dry-run", action="store_true", help="print and do not record")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.round_all:
        layer.used_experts = lambda index, count: None
    for experts in options.experts:
        for tokens in options.tokens:
            passes = {
                (implementation, name): Pass(config, implementation, experts, options.width, tokens)
                for implementation in options.implementations
                for name, config in CONFIGS.items()
            }
            seconds = processor_time(passes, options.repeats)
            rows = []
            for (implementation, name), one in passes.items():
                median = quantile(seconds[implementation, name], 0.5)
                row = {"experts": experts, "tokens": tokens, "width": options.width, "implementation": implementation}
                row |= {
                    "config": f"{name}, all rounded" if options.round_all else name,
                    "cpu_ms": round(1000 * median, 1),
                }
                plain = quantile(seconds[implementation, "plain"], 0.5)
                rows.append({**row, "ratio": round(median / plain, 2), "peak_weights": round(one.peak_weights(), 2)})
            if options.dry_run:
                print(*rows, sep="\n")
            else:
                append_rows("experts", rows)


if __name__ == "__main__":
    main()
