"""Small models of Llama's shape, and their calibration batches."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

GOLDEN = Path(__file__).parents[2] / "data" / "recipes"
RUNS = ("mha", "gqa", "published_constants_6_layers")
# By which the golden runs multiply o_proj and down_proj of each layer.
FACTORS = (0.5, 1.5, 1.0, 2.0, 0.8, 1.2)
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "llama tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, {"sliding_window": 16, "query_pre_attn_scalar": 4}),
}


def golden(name: str) -> Any:
    return json.loads((GOLDEN / f"adapt_pruner_{name}.json").read_text())


def golden_model(run: dict) -> LlamaForCausalLM:
    """The model of a golden run, its weights from NumPy's generator."""
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=run["hidden_size"],
        intermediate_size=run["intermediate_size"],
        num_hidden_layers=run["layers"],
        num_attention_heads=run["heads"],
        num_key_value_heads=run["kv_heads"],
        head_dim=run["head_dim"],
        max_position_embeddings=64,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).double()
    random = np.random.RandomState(run["seed"])
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.data.fill_(1)
            continue
        values = random.standard_normal(tuple(parameter.shape)) * 0.15
        if "o_proj" in name or "down_proj" in name:
            values *= FACTORS[int(name.split(".")[2])]
        parameter.data.copy_(torch.from_numpy(values))
    return model


def golden_batches(run: dict) -> list[dict]:
    return [{"input_ids": ids} for ids in torch.tensor(run["input_ids"]).split(run["batch_size"])]


def small(family: str = "llama", **overrides) -> torch.nn.Module:
    """A model with weights large enough that every unit matters, norms and biases included."""
    torch.manual_seed(0)
    config_cls, model_cls, more = FAMILIES[family]
    model = model_cls(config_cls(**{**SHAPE, **more, **overrides})).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2 if parameter.ndim == 2 else 0.5)
    return model


def batches(count: int = 2, rows: int = 3, length: int = 12, seed: int = 5) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(64, (rows, length), generator=generator)} for _ in range(count)]


@torch.no_grad()
def logits(model, ids=None) -> torch.Tensor:
    return model.eval()(input_ids=batches(1)[0]["input_ids"] if ids is None else ids).logits
