"""What an adapter inside of the rounding costs: milliseconds of a micro-batch.

python benchmarks/merged_lora.py      # rows in results/merged_lora.csv
"""

import argparse

import torch
from _record import append_rows, interleaved, quantile
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_stablespam import FourBitConfig, convert_to_4bit

SHAPES = ((576, 576), (576, 1536), (1536, 576))  # of SmolLM2-135M
TOKENS = 512


class Layer(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def adapted(inputs: int, outputs: int, config: FourBitConfig | None, rank: int) -> nn.Module:
    """One layer with an adapter, in 4 bits if a configuration is given."""
    layer = Layer(inputs, outputs)
    if config is not None:
        convert_to_4bit(layer, config)
    return get_peft_model(layer, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["linear"])).train()


def run(layer: nn.Module, x: torch.Tensor, micro_batches: int):
    """One optimizer step."""
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        for _ in range(micro_batches):
            with torch.autocast("cpu", torch.bfloat16):
                y = layer(x)
            y.float().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    separate = FourBitConfig("int4", None, group_size=32)
    merged = FourBitConfig("int4", None, group_size=32, adapters="merged")
    for inputs, outputs in SHAPES:
        x = torch.randn(TOKENS, inputs, requires_grad=True)
        cases = {
            "plain LoRA": (adapted(inputs, outputs, None, options.rank), 4),
            "separate": (adapted(inputs, outputs, separate, options.rank), 4),
            "merged": (adapted(inputs, outputs, merged, options.rank), 4),
        }
        seconds = interleaved({name: run(layer, x, n) for name, (layer, n) in cases.items()}, options.repeats)
        rows = []
        for name, (_, micro_batches) in cases.items():
            rows.append(
                {
                    "inputs": inputs,
                    "outputs": outputs,
                    "rank": options.rank,
                    "adapter": name,
                    "ms_per_micro_batch": round(1e3 * quantile(seconds[name], 0.5) / micro_batches, 2),
                    "kept_bytes": 0,  # between micro-batches; rows with more are of versions that shared the weight
                }
            )
        append_rows("merged_lora", rows)


if __name__ == "__main__":
    main()
