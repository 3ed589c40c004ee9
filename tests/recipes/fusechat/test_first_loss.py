"""The check before DPO's first step: what else is in TRL's loss, and what is no plain sigmoid loss."""

import math

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from hf_stablespam.recipes.fusechat import train_target
from hf_stablespam.recipes.fusechat.reference import check_reference
from tests.recipes.fusechat.helpers import preferences, target, tokenizer
from tests.recipes.fusechat.test_training import history, settings

trl = pytest.importorskip("trl", minversion="1.14", reason="TRL 1.14 or newer is not installed; extra 'fusechat'")


def mixture():
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            **{"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1},
            **{"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64},
            **{"num_local_experts": 4, "router_aux_loss_coef": 0.02},
            **{"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1},
        )
    )


def test_a_mixture_of_experts_is_trained_with_its_routers_loss(tmp_path):
    sft_args, dpo_args = settings(tmp_path)
    train_target(mixture(), tokenizer(), preferences(), sft_args, dpo_args)
    first = next(row for row in history(tmp_path / "dpo") if "loss" in row)
    assert first["aux_loss"] > 0
    assert first["loss"] == pytest.approx(math.log(2) + 0.02 * first["aux_loss"], abs=1e-3)


def dpo_trainer(folder, reference=None, **dpo):
    _, dpo_args = settings(folder, dpo=dpo)
    rows = {"train_dataset": preferences()["dpo"], "processing_class": tokenizer()}
    return trl.DPOTrainer(target(), reference or target(), dpo_args, **rows)


def test_the_weight_of_the_loss_counts(tmp_path):
    other = target()
    with torch.no_grad():
        other.lm_head.weight.mul_(3)
    check_reference(dpo_trainer(tmp_path, loss_weights=[0.5]))
    with pytest.raises(ValueError, match=r"must be 0.5 · ln 2 = 0.3466, got 0\.\d+: the reference"):
        check_reference(dpo_trainer(tmp_path, other, loss_weights=[0.5]))


def test_a_weighted_loss_begins_elsewhere(tmp_path):
    check_reference(dpo_trainer(tmp_path, use_weighting=True))
