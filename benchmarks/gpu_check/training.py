"""A training step of the 350M Llama, 8 x 1024 tokens in bfloat16: tokens per second and memory."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu_check.common import DEVICE, Check, by_triton, medians, peak_gib, reset_peak
from benchmarks.llama_shapes import SHAPES
from hf_stablespam import FourBitConfig, StableSPAM, convert_to_4bit

FORMATS: dict[str, FourBitConfig | None] = {
    "AdamW, bfloat16": None,
    "Stable-SPAM, bfloat16": None,
    "Stable-SPAM, int4": FourBitConfig(fused=True),
    "Stable-SPAM, nvfp4": FourBitConfig.from_dict({**FourBitConfig.nvfp4().to_dict(), "fused": True}),
}


def llama(size: str, vocabulary: int = 32_000, length: int = 1024) -> LlamaForCausalLM:
    """A Llama of the papers' shapes with random weights in bfloat16."""
    hidden, intermediate, layers, heads = (64, 96, 2, 2) if size == "rehearsal" else SHAPES[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=length,
    )
    return LlamaForCausalLM(config).to(DEVICE, torch.bfloat16)


def optimizer_for(name: str, params: Any, lr: float, options: dict[str, Any]) -> torch.optim.Optimizer:
    """Fused AdamW, or Stable-SPAM by its kernels, as the name begins."""
    if name.startswith("AdamW"):
        return torch.optim.AdamW(params, lr=lr, fused=True)
    return StableSPAM(params, lr=lr, **options)


def main(check: Check) -> None:
    """One after the other, as each fills the memory; fused AdamW first and last."""
    size, vocabulary, batch, length = ("rehearsal", 64, 1, 16) if check.rehearsal else ("350m", 32_000, 8, 1024)
    tokens = torch.randint(vocabulary, (batch, length), device=DEVICE)
    base = 0.0
    for name, config in [*FORMATS.items(), ("AdamW, bfloat16, again", None)]:
        with check.trying(check="training step", model=size, run=name) as found, by_triton() as options:
            reset_peak()
            model = llama(size, vocabulary)
            if config is not None:
                convert_to_4bit(model, config)
            optimizer = optimizer_for(name, model.parameters(), 1e-4, options)

            def step(model: Any = model, optimizer: Any = optimizer) -> None:
                model(tokens, labels=tokens).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

            ms = medians({name: step}, 1 if check.rehearsal else 8, warm_up=0 if check.rehearsal else 3)[name]
            base = base or ms
            found.update(
                ms=round(ms, 2),
                tokens_per_second=round(tokens.numel() / ms * 1e3),
                to_adamw=round(ms / base, 3),
                peak_gib=peak_gib(),
            )
            del model, optimizer, step
