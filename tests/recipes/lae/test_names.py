"""Adapters under other names, and what a folder remembers of the model."""

import pytest
import torch
from peft import BOFTConfig, OFTConfig, VBLoRAConfig, get_peft_model

from hf_stablespam.recipes.lae import IncrementalClassifier, LAEModel, add_lae_adapters, lae_predict
from hf_stablespam.recipes.lae.adapters import add_expert
from tests.recipes.lae.helpers import WIDTH, Images, lora, tiny_vit, train_task, vit_model

NAMES = {"online": "fast", "offline": "slow"}


def test_experts_of_other_names_are_saved_and_found_again(tmp_path):
    model = LAEModel(get_peft_model(tiny_vit(), lora(), adapter_name="fast"), IncrementalClassifier(WIDTH))
    for task in range(2):
        model.classifier.add_task(2)
        train_task(model, tmp_path / str(task), task, lae=NAMES, save_strategy="epoch")
    loaded = LAEModel.from_pretrained(tiny_vit(), tmp_path / "1" / "checkpoint-6")
    assert list(loaded.peft_model.peft_config) == ["fast", "slow"]
    for experts in (("fast",), ("slow",), ("fast", "slow")):
        assert torch.equal(
            lae_predict(loaded, Images().batch(), experts), lae_predict(model, Images().batch(), experts)
        )
    loaded.classifier.add_task(2)
    train_task(loaded, tmp_path / "2", 2, lae=NAMES)


def test_an_average_of_another_name_is_not_dropped_from_a_checkpoint(tmp_path):
    model = vit_model()
    train_task(model, tmp_path / "0")
    model.classifier.add_task(2)
    train_task(model, tmp_path / "1", 1, lae={"offline": "slow"}, save_strategy="epoch")
    with pytest.raises(ValueError, match=r"of it not in the model, first peft_model\..*\.slow"):
        train_task(vit_model(tasks=2), tmp_path / "1", 0, resume=str(tmp_path / "1" / "checkpoint-3"))


@pytest.mark.parametrize("local_loss", [True, False])
def test_the_kind_of_loss_is_remembered(local_loss, tmp_path):
    model = vit_model(tasks=2)
    model.local_loss = local_loss
    model.save_pretrained(tmp_path)
    assert LAEModel.from_pretrained(tiny_vit(), tmp_path).local_loss is local_loss
    description = tmp_path / "lae.json"
    description.write_text(description.read_text().replace('"local_loss"', '"other"'))  # a folder of before
    assert LAEModel.from_pretrained(tiny_vit(), tmp_path).local_loss


@pytest.mark.parametrize(
    "config",
    [
        VBLoRAConfig(target_modules=["k_proj", "v_proj"], r=2, vector_length=4, num_vectors=8, topk=2),
        OFTConfig(target_modules=["k_proj"], r=0, oft_block_size=4),
        BOFTConfig(target_modules=["k_proj"], boft_block_size=4),
    ],
    ids=lambda config: type(config).__name__,
)
def test_shared_parameters_and_buffers_of_adapters_are_no_strangers(config):
    model = LAEModel(add_lae_adapters(tiny_vit(), config, calibrate=False), IncrementalClassifier(WIDTH))
    model.classifier.add_task(2)
    model.load_state_dict(model.state_dict())
    add_expert(model.peft_model, "offline")
    model.load_state_dict(model.state_dict())
