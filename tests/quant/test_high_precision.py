"""What stays in high precision by itself: heads, tied decoders, routers; and groups that fit a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from hf_stablespam.quant import FourBitConfig, FourBitLinear, convert_to_4bit
from hf_stablespam.quant.convert import left_alone

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
MOE = {"num_key_value_heads": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 16, **SHAPE}


def heads_left(model: nn.Module) -> set[str]:
    convert_to_4bit(model)
    return {name for name, module in model.named_modules() if type(module) is nn.Linear}


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("Bert", {}, {"cls.predictions.transform.dense", "cls.predictions.decoder"}),
        ("Roberta", {"pad_token_id": 1}, {"lm_head.dense", "lm_head.decoder"}),
        ("Albert", {"embedding_size": 32}, {"predictions.dense", "predictions.decoder"}),
        ("Electra", {"embedding_size": 32}, {"generator_predictions.dense", "generator_lm_head"}),
        ("DebertaV2", {}, {"cls.predictions.transform.dense", "cls.predictions.decoder"}),
        ("ModernBert", {"pad_token_id": 0}, {"head.dense", "decoder"}),
    ],
)
def test_heads_of_masked_language_models(kind: str, options: dict[str, Any], expected: set[str]) -> None:
    model = getattr(tf, f"{kind}ForMaskedLM")(getattr(tf, f"{kind}Config")(**{**SHAPE, **options}))
    assert heads_left(model) == expected
    body = [name for name, module in model.named_modules() if isinstance(module, FourBitLinear)]
    assert len(body) >= 4


def test_heads_of_other_tasks() -> None:
    bert = tf.BertConfig(**SHAPE)
    assert heads_left(tf.BertForSequenceClassification(bert)) == {"classifier", "bert.pooler.dense"}
    assert heads_left(tf.BertForQuestionAnswering(bert)) == {"qa_outputs"}
    llama = tf.LlamaConfig(**SHAPE)
    assert heads_left(tf.LlamaForSequenceClassification(llama)) == {"score"}
    assert heads_left(tf.LlamaForCausalLM(llama)) == {"lm_head"}
    neox = tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**SHAPE))
    assert len(heads_left(neox)) == 1  # called embed_out before transformers 5
    whisper = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    whisper |= {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 64, "num_mel_bins": 8}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    assert heads_left(tf.WhisperForConditionalGeneration(tf.WhisperConfig(**whisper, **tokens))) == {"proj_out"}


def test_a_vision_tower_beside_the_language_model_is_no_head() -> None:
    class Tower(tf.BertModel):
        pass

    model = tf.LlamaForCausalLM(tf.LlamaConfig(**SHAPE))
    model.vision_tower = Tower(tf.BertConfig(**SHAPE))
    model.projector = nn.Linear(32, 32)
    assert heads_left(model) == {"lm_head", "projector", "vision_tower.pooler.dense"}


def test_adapted_models_have_the_same_heads() -> None:
    peft = pytest.importorskip("peft", reason="adapters need peft")
    model = tf.BertForSequenceClassification(tf.BertConfig(**SHAPE))
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query", "dense"], task_type="SEQ_CLS"))
    convert_to_4bit(model)
    body = {name for name, module in model.named_modules() if isinstance(module, FourBitLinear)}
    assert len(body) == 6
    assert not any("pooler" in name or "classifier" in name for name in body)


def test_a_head_is_converted_if_it_is_named() -> None:
    named = FourBitConfig(modules_to_not_convert=(), target_modules=("lm_head", "q_proj"))
    model = convert_to_4bit(tf.LlamaForCausalLM(tf.LlamaConfig(**SHAPE)), named)
    assert isinstance(model.lm_head, FourBitLinear)


def test_routers_and_gates_of_mixtures_are_left_alone() -> None:
    qwen = tf.Qwen2MoeForCausalLM(tf.Qwen2MoeConfig(num_experts=4, shared_expert_intermediate_size=16, **MOE))
    left = heads_left(qwen)
    assert left == {"lm_head", "model.layers.0.mlp.shared_expert_gate"}
    assert isinstance(qwen.model.layers[0].mlp.shared_expert.gate_proj, FourBitLinear)
    hunyuan = tf.HunYuanMoEV1ForCausalLM(tf.HunYuanMoEV1Config(num_experts=4, head_dim=16, moe_topk=2, **MOE))
    assert heads_left(hunyuan) == {"lm_head", "model.layers.0.mlp.gate.wg"}


def test_routers_by_their_place() -> None:
    """As code of transformers 4 has them, and families that are too large to build here."""

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(8, 4)
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    class Gated(nn.Module):
        """A gate without experts is an ordinary layer."""

        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(8, 8)
            self.router = nn.ModuleDict({"proj": nn.Linear(8, 4)})

    model = convert_to_4bit(nn.ModuleDict({"mixture": Mixture(), "gated": Gated()}))
    left = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    assert left == {"mixture.gate", "gated.router.proj"}


@pytest.mark.parametrize(("width", "expected"), [(256, 128), (192, 64), (96, 32)])
def test_the_largest_group_that_fits_every_row(width: int, expected: int) -> None:
    model = nn.Sequential(nn.Linear(128, width), nn.Linear(width, 128))
    for _ in range(2):  # converting again finds the same
        convert_to_4bit(model, FourBitConfig(group_size="auto"))
        assert model[0].four_bit.group_size == model[1].four_bit.group_size == expected
    assert model(torch.ones(2, 128)).shape == (2, 128)


def test_formats_with_groups_of_their_own_need_none_that_fits() -> None:
    model = convert_to_4bit(nn.Sequential(nn.Linear(48, 48)), FourBitConfig("nvfp4", "nvfp4", group_size="auto"))
    assert model[0].four_bit == FourBitConfig.nvfp4()
    convert_to_4bit(model, FourBitConfig("nvfp4", "nvfp4", group_size="auto"))
    with pytest.raises(ValueError, match=r"'auto' must find one of .* 0 has 48"):
        convert_to_4bit(nn.Sequential(nn.Linear(48, 48)), FourBitConfig("nvfp4", "int4", group_size="auto"))


def test_rows_that_no_group_fits_are_named() -> None:
    model = nn.Sequential(nn.Linear(128, 40), nn.Linear(40, 8))
    with pytest.raises(ValueError, match=r"'auto' must find one of 128, 64, 32 .* but 1 has 40; name these layers"):
        convert_to_4bit(model, FourBitConfig(group_size="auto"))
    convert_to_4bit(model, FourBitConfig(group_size="auto", modules_to_not_convert="1"))
    with pytest.raises(ValueError, match="group_size='auto' becomes a number when a model is converted"):
        FourBitLinear(8, 8, config=FourBitConfig(group_size="auto"))
    with pytest.raises(ValueError, match="group_size must be an integer, at least 1, got 'car'"):
        FourBitConfig(group_size="car")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=32, n_head=2, n_layer=1, vocab_size=64)), r"\(Conv1D\)"),
        (lambda: tf.FalconForCausalLM(tf.FalconConfig(**SHAPE)), r"\(FalconLinear\)"),
    ],
)
def test_the_error_for_a_model_of_other_layers_does_not_advise_to_round_its_head(model: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"no nn.Linear but lm_head, which stay.*{message}") as error:
        convert_to_4bit(model())
    assert "change these" not in str(error.value)


def test_siblings_that_peft_has_wrapped_share_a_scale() -> None:
    peft = pytest.importorskip("peft", reason="adapters need peft")
    options = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(tf.LlamaForCausalLM(tf.LlamaConfig(**SHAPE)), options)
    convert_to_4bit(model, FourBitConfig("nvfp4", None))
    attention = model.base_model.model.model.layers[0].self_attn
    expected = (attention.q_proj.base_layer, attention.k_proj, attention.v_proj.base_layer)
    assert attention.k_proj.scale_partners == attention.q_proj.base_layer.scale_partners == expected
    ids = torch.arange(8).unsqueeze(0)
    merged = model.merge_and_unload().eval()
    before = merged(ids).logits
    convert_to_4bit(merged, FourBitConfig("nvfp4", None))
    assert torch.equal(merged(ids).logits, before)


def test_what_is_left_is_announced() -> None:
    model = convert_to_4bit(tf.BertForSequenceClassification(tf.BertConfig(**SHAPE)))
    assert "bert.pooler.dense (Linear)" in left_alone(model)
