"""Models that transformers itself prepared for 4-bit training: left alone, and trained by StableSPAM."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_stablespam.optim import StableSPAM
from hf_stablespam.quant import FourBitLinear, convert_to_4bit

IDS = torch.randint(0, 60, (1, 32), generator=torch.Generator().manual_seed(0))  # fouroversix trains single rows only


def saved_llama(path: Path) -> Path:
    config = LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def assert_left_alone(model: nn.Module, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="hf_stablespam"):
        assert convert_to_4bit(model) is model
    assert not any(isinstance(module, FourBitLinear) for module in model.modules())
    assert len(caplog.records) == 1
    assert f"prepared by transformers; left alone: model.layers.0.self_attn.q_proj ({kind})" in caplog.text.replace(
        "layers.*", "layers.0"
    )


def assert_trainable(model: nn.Module) -> None:
    optimizer = StableSPAM(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(6):
        ids = IDS.to(model.device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_their_layers_are_known_by_their_package(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prepared = type("FourOverSixLinear", (nn.Linear,), {"__module__": "fouroversix.model.modules.linear"})
    model = LlamaForCausalLM.from_pretrained(saved_llama(tmp_path))
    for module in model.model.modules():
        if type(module) is nn.Linear:
            module.__class__ = prepared
    assert_left_alone(model, "FourOverSixLinear", caplog)
    assert_trainable(model)


def test_fouroversix(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip(
        "fouroversix", reason="SKIP_CUDA_BUILD=1 pip install --no-build-isolation fouroversix (builds from source)"
    )
    from transformers import FourOverSixConfig

    model = LlamaForCausalLM.from_pretrained(
        saved_llama(tmp_path), quantization_config=FourOverSixConfig(keep_master_weights=True)
    )
    assert_left_alone(model, "FourOverSixLinear", caplog)
    assert torch.isfinite(model(input_ids=IDS, labels=IDS).loss)
    if not torch.cuda.is_available():
        pytest.skip("left alone as it should be; but the backward pass of fouroversix 1.0.5 needs CUDA")
    assert_trainable(model.cuda())


def test_fp_quant(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("fp_quant", reason="pip install fp_quant")
    if not torch.cuda.is_available():
        pytest.skip("fp_quant's pseudo-quantization is made of Triton kernels, which need a GPU")
    from transformers import FPQuantConfig

    model = LlamaForCausalLM.from_pretrained(
        saved_llama(tmp_path),
        quantization_config=FPQuantConfig(store_master_weights=True, pseudoquantization=True),
        device_map="cuda",
        dtype=torch.bfloat16,
    )
    assert_left_alone(model, "FPQuantLinear", caplog)
    assert_trainable(model)
