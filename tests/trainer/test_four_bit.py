"""FourBitCallback in the Trainer."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hf_stablespam.quant import FourBitConfig, FourBitLinear
from hf_stablespam.trainer.four_bit import FourBitCallback


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=32,
        )
    )


class Data(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict:
        ids = torch.randint(0, 64, (16,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def arguments(path: Path, **options) -> TrainingArguments:
    return TrainingArguments(
        str(path),
        max_steps=3,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        max_grad_norm=0.0,
        **options,
    )


def test_the_model_is_converted_at_once_and_trains(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny()
    keys, before = list(model.state_dict()), model.model.layers[0].mlp.up_proj.weight.detach().clone()
    with caplog.at_level(logging.INFO, logger="hf_stablespam"):
        trainer = Trainer(model, arguments(tmp_path), train_dataset=Data(), callbacks=[FourBitCallback()])
    assert isinstance(model.model.layers[0].mlp.up_proj, FourBitLinear)
    assert type(model.lm_head) is torch.nn.Linear
    trainer.train()
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before)
    assert list(model.state_dict()) == keys
    lines = [record.getMessage() for record in caplog.records if "4-bit training" in record.getMessage()]
    assert len(lines) == 1
    assert "converted 14 linear layers" in lines[0]
    assert "lm_head (Linear)" in lines[0]


def test_a_model_made_by_model_init_is_converted_when_training_begins(tmp_path: Path) -> None:
    trainer = Trainer(
        model_init=tiny,
        args=arguments(tmp_path),
        train_dataset=Data(),
        callbacks=[FourBitCallback(FourBitConfig.nvfp4())],
    )
    first = trainer.model
    trainer.train()
    assert trainer.model is not first
    assert isinstance(trainer.model.model.layers[1].self_attn.q_proj, FourBitLinear)


def test_saved_models_are_ordinary_checkpoints(tmp_path: Path) -> None:
    trainer = Trainer(tiny(), arguments(tmp_path), train_dataset=Data(), callbacks=[FourBitCallback()])
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert type(plain.model.layers[0].mlp.up_proj) is torch.nn.Linear
    for key, value in trainer.model.state_dict().items():
        assert torch.equal(plain.state_dict()[key], value)
    assert FourBitConfig.from_dict(plain.config.four_bit_training) == FourBitConfig()


def test_a_wrong_configuration_is_refused() -> None:
    with pytest.raises(TypeError, match=r"config must be a FourBitConfig, got str; use FourBitConfig\(...\)"):
        FourBitCallback("int4")


def test_a_model_without_linear_layers_is_refused_before_training(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(4, 4))
    with pytest.raises(ValueError, match="no layer to convert to 4 bits"):
        Trainer(model, arguments(tmp_path), train_dataset=Data(), callbacks=[FourBitCallback()])
