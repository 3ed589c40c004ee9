"""4-bit layers in real models: every kind trains, compiles, checkpoints, and takes adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from hf_stablespam.quant import FourBitConfig, FourBitLinear, convert_to_4bit, export_4bit, restore_linear
from hf_stablespam.quant.layers.matmul import Recipe, quantize_weight

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = torch.randint(0, 60, (2, 12), generator=torch.Generator().manual_seed(0))
TEXT = {"input_ids": IDS, "labels": IDS}
MOE = {"num_experts_per_tok": 2, "num_key_value_heads": 2}


def llama(**options: Any) -> tf.PreTrainedModel:
    return tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=64, num_key_value_heads=2, **SHAPE, **options))


def vit() -> tf.PreTrainedModel:
    return tf.ViTForImageClassification(tf.ViTConfig(image_size=16, patch_size=8, **SHAPE))


def t5() -> tf.PreTrainedModel:
    config = tf.T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2)
    config.decoder_start_token_id = 0
    return tf.T5ForConditionalGeneration(config)


def qwen_moe() -> tf.PreTrainedModel:
    config = tf.Qwen3MoeConfig(vocab_size=64, head_dim=16, num_experts=4, moe_intermediate_size=16, **MOE, **SHAPE)
    return tf.Qwen3MoeForCausalLM(config)


IMAGES = {
    "pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)),
    "labels": torch.tensor([0, 1]),
}
MODELS: dict[str, tuple[Callable[[], tf.PreTrainedModel], dict[str, Any], int]] = {
    "llama": (llama, TEXT, 14),
    "tied": (lambda: llama(tie_word_embeddings=True), TEXT, 14),
    "qwen": (
        lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(vocab_size=64, head_dim=16, num_key_value_heads=2, **SHAPE)),
        TEXT,
        14,
    ),
    # GPT-NeoX called its head embed_out before transformers 5.
    "neox": (lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(vocab_size=64, **SHAPE)), TEXT, 8),
    "bert": (lambda: tf.BertForMaskedLM(tf.BertConfig(vocab_size=64, **SHAPE)), TEXT, 12),
    "vit": (vit, IMAGES, 12),
    "t5": (t5, TEXT, 32),
    "qwen_moe": (qwen_moe, TEXT, 8),
}
CONFIGS = {"int4": FourBitConfig(), "nvfp4": FourBitConfig.nvfp4(gradient=True)}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_trains(name: str, config: str) -> None:
    make, batch, count = MODELS[name]
    model = convert_to_4bit(make(), CONFIGS[config])
    assert sum(isinstance(module, FourBitLinear) for module in model.modules()) >= count
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = model(**batch).loss
        loss.backward()
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.01
    restored = restore_linear(copy.deepcopy(model))
    assert {type(m) for m in restored.modules()}.isdisjoint({FourBitLinear})
    assert list(restored.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_train(dtype: torch.dtype) -> None:
    model = convert_to_4bit(llama().to(dtype))
    loss = model(**TEXT).loss
    loss.backward()
    assert all(p.grad.dtype == dtype and torch.isfinite(p.grad).all() for p in model.parameters())


def test_gpt2_is_refused_by_the_name_of_its_layers() -> None:
    model = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match=r"not supported: .*transformer.h.\*.attn.c_attn \(Conv1D\)"):
        convert_to_4bit(model)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**TEXT).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    model = convert_to_4bit(llama(), FourBitConfig("nvfp4", "int4", "int4", gradient_rounding="nearest")).train()
    plain = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    checkpointed = gradients(model)
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


@pytest.mark.slow
@pytest.mark.parametrize("config", [FourBitConfig(), FourBitConfig.nvfp4(gradient=True)], ids=["int4", "nvfp4"])
def test_compiling_breaks_no_graph(config: FourBitConfig) -> None:
    torch._dynamo.reset()
    model = convert_to_4bit(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), config)
    x = torch.randn(8, 64, requires_grad=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    y.sum().backward()
    assert torch.equal(y, model(x))
    if config.gradient is None:
        expected = torch.autograd.grad(model(x).sum(), x)[0]
        torch.testing.assert_close(x.grad, expected)
    with torch.no_grad():
        model[0].weight.mul_(2)
    assert torch.equal(compiled(x), model(x))


@pytest.mark.slow
def test_inductor_computes_the_same() -> None:
    torch._dynamo.reset()
    layer = FourBitLinear(64, 64, config=FourBitConfig("mxfp4", "int4", activation_outliers=1))
    x = torch.randn(8, 64)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x))


@pytest.mark.slow
def test_compiled_layers_multiply_with_the_weights_that_are_exported() -> None:
    """Inductor leaves out casts there and back, so that a scale rounded by one stayed unrounded."""
    torch._dynamo.reset()
    real = [
        FourBitConfig(name, scale_dtype=scale) for name in ("int4", "int4_asym") for scale in ("bfloat16", "float16")
    ]
    block = [FourBitConfig("mxfp4"), FourBitConfig("nvfp4"), FourBitConfig("nvfp4", four_over_six=True)]
    configs = [*real, FourBitConfig("fp4_e1m2"), FourBitConfig("fp4_e2m1"), *block]
    recipes = [Recipe.of(replace(config, group_size=32)) for config in configs]

    @torch.compile(fullgraph=True)
    def compiled(weight: torch.Tensor) -> list[torch.Tensor]:
        return [quantize_weight(weight, recipe, weight.dtype) for recipe in recipes]

    weight = torch.randn(64, 64)
    for config, recipe, got in zip(configs, recipes, compiled(weight), strict=True):
        assert torch.equal(got, quantize_weight(weight, recipe, weight.dtype)), config


class TestAdapters:
    @pytest.fixture
    def peft(self) -> Any:
        return pytest.importorskip("peft", reason="adapters need peft")

    @pytest.mark.parametrize("first", ["convert", "adapt"])
    def test_lora_trains_on_a_frozen_4bit_base(self, peft: Any, first: str) -> None:
        model = llama()
        options = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"])
        if first == "convert":
            model = peft.get_peft_model(convert_to_4bit(model), options)
        else:
            model = convert_to_4bit(peft.get_peft_model(model, options))
        names = {name for name, module in model.named_modules() if isinstance(module, FourBitLinear)}
        assert len(names) == 14
        assert not any("lora" in name for name in names)
        model(**TEXT).loss.backward()
        trained = {name for name, p in model.named_parameters() if p.grad is not None}
        assert len(trained) == 8
        assert all("lora" in name for name in trained)

    @pytest.mark.parametrize("safe", [False, True])
    @pytest.mark.parametrize("kind", ["LoraConfig", "VeraConfig", "OFTConfig", "BOFTConfig", "IA3Config"])
    def test_merging_and_unmerging_change_what_the_layers_compute(self, peft: Any, kind: str, safe: bool) -> None:
        """Merging writes to ``weight.data``."""
        options = {
            **{"LoraConfig": {"r": 4, "init_lora_weights": False}, "VeraConfig": {"init_weights": False}},
            **{"OFTConfig": {"r": 0, "oft_block_size": 16, "init_weights": False}},
            **{"BOFTConfig": {"boft_block_size": 4, "init_weights": False}},
            **{"IA3Config": {"feedforward_modules": [], "init_ia3_weights": False}},
        }[kind]
        base = convert_to_4bit(llama())
        model = peft.get_peft_model(base, getattr(peft, kind)(target_modules=["q_proj"], **options)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
            before = model(**TEXT).logits
            model.merge_adapter(safe_merge=safe)
            assert torch.equal(model(**TEXT).logits, model(**TEXT).logits)
            merged = model(**TEXT).logits
            twin = convert_to_4bit(llama())
            state = {name.replace("base_layer.", ""): value for name, value in base.state_dict().items()}
            twin.load_state_dict({name: state[name] for name in twin.state_dict()})
            assert torch.equal(merged, twin.eval()(**TEXT).logits)
            assert not torch.equal(merged, before)
            model.unmerge_adapter()
            torch.testing.assert_close(model(**TEXT).logits, before, rtol=0, atol=0.3)

    def test_a_merged_adapter_is_ready_for_export(self, peft: Any) -> None:
        model = peft.get_peft_model(convert_to_4bit(llama()), peft.LoraConfig(r=4, target_modules=["q_proj"]))
        merged = model.merge_and_unload()
        assert isinstance(merged.model.layers[0].self_attn.q_proj, FourBitLinear)
        pytest.importorskip("compressed_tensors", reason="export needs it; install the extra 'export'")
        with pytest.raises(ValueError, match=r"a PEFT model cannot be packed; .* model = model.merge_and_unload\(\)"):
            export_4bit(model, "unused")
