"""Adapters on a base in full precision, in 4 bits, and quantised by others."""

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer

from hf_stablespam import FourBitCallback, FourBitLinear, GradientNormCallback, StableSPAM
from tests.trainer.helpers import RandomTokens, arguments, optimizer_of, tiny_llama, training_logs


def train(tmp_path, model, *others):
    trainer = Trainer(
        model, arguments(tmp_path), train_dataset=RandomTokens(), callbacks=[GradientNormCallback(), *others]
    )
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    adapters = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    named = dict(model.named_parameters())
    assert isinstance(optimizer_of(trainer), StableSPAM)
    assert all(torch.equal(named[name], before) for name, before in frozen.items())
    assert all(torch.isfinite(named[name]).all() for name in adapters)
    assert all(not torch.equal(named[name], before) for name, before in adapters.items() if "lora_B" in name)
    assert all(row["gradients/norm"] > 0 for row in training_logs(trainer))
    return trainer


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("four_bit", [False, True])
def test_lora_and_dora(tmp_path, use_dora, four_bit):
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=use_dora, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(), config)
    train(tmp_path, model, *([FourBitCallback()] if four_bit else []))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert isinstance(layer.base_layer, FourBitLinear) is four_bit
    assert not isinstance(layer.lora_A["default"], FourBitLinear)


def test_a_base_that_torchao_quantised(tmp_path):
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed: it is in the extra lowbit")
    model = tiny_llama(hidden_size=32, intermediate_size=64)
    torchao.quantize_(model.model, torchao.Int8WeightOnlyConfig())
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    trainer = Trainer(model, arguments(tmp_path), train_dataset=RandomTokens(), callbacks=[GradientNormCallback()])
    trainer.train()
    assert isinstance(optimizer_of(trainer), StableSPAM)
    assert any(p.abs().sum() > 0 for n, p in model.named_parameters() if "lora_B" in n)


def test_a_base_that_bitsandbytes_quantised(tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: see `make test-versions`")
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=nf4, device_map="cpu")
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    train(tmp_path, get_peft_model(prepare_model_for_kbit_training(model), config))
