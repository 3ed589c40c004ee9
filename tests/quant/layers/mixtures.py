"""Tiny mixtures of experts, and the formats that tests train them in."""

import inspect

import pytest
import torch
import transformers.integrations
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from hf_stablespam import FourBitConfig
from hf_stablespam.quant.layers.experts import is_experts

SHAPE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16}
SHAPE |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "num_experts_per_tok": 2, "pad_token_id": 0}
FAMILIES = {
    "qwen3_moe": {"num_experts": 4, "intermediate_size": 64, "moe_intermediate_size": 32},
    "mixtral": {"num_local_experts": 4, "intermediate_size": 32},
    "gpt_oss": {"num_local_experts": 4, "intermediate_size": 32, "layer_types": ["full_attention"]},
}
FORMATS = {
    "int4 weights": FourBitConfig(activation=None, group_size=32),
    "int4": FourBitConfig(group_size=32),
    "mxfp4": FourBitConfig(weight="mxfp4", activation="mxfp4"),
    "nvfp4": FourBitConfig.nvfp4(),
    "nvfp4 with gradients": FourBitConfig.nvfp4(gradient=True),
}
_decorator = getattr(transformers.integrations, "use_experts_implementation", None)
# Before transformers 5 experts are lists of `nn.Linear`, and in 5.0.0 nothing tells of what form they are.
HAS_SHARED_FORM = _decorator is not None and "has_gate" in inspect.signature(_decorator).parameters
# What is trained whole, by the Trainer, by TRL and on two processes.
FAMILIES_TRAINED = ("qwen3_moe", "gpt_oss") if HAS_SHARED_FORM else ()
TRAINED = [(family, name) for family in FAMILIES_TRAINED for name in ("int4", "mxfp4")]
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
TOKENS = torch.arange(24).view(2, 12) % 7  # few kinds of tokens: an expert or two get none


def need_shared_form() -> None:
    """Skip a module's tests where this transformers has no experts of the form that is converted."""
    if not HAS_SHARED_FORM:
        reason = f"experts have another form in transformers {transformers.__version__} (seen: 4.57.6, 5.0.0)"
        pytest.skip(reason, allow_module_level=True)


def mixture(family: str = "qwen3_moe", implementation: str = "grouped_mm") -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SHAPE, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config)
    model.set_experts_implementation(implementation)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:  # large enough for outputs to be told apart
                parameter.normal_(std=0.3)
    return model


def experts_of(model: nn.Module) -> nn.Module:
    (found,) = [module for module in model.modules() if is_experts(module)]
    return found
