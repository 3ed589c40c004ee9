"""LoRA's starts that take the adapter out of the backbone's weights do so once, for the online expert."""

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda

from hf_stablespam.recipes.lae import IncrementalClassifier, LAEModel, add_lae_adapters, lae_predict
from hf_stablespam.recipes.lae.adapters import active_expert, adapter_parameters, add_expert
from tests.recipes.lae.helpers import KEYS_AND_VALUES, WIDTH, Images, tiny_vit, train_task

STARTS = ["pissa", "pissa_niter_4", "olora", "orthogonal", "corda", "gaussian", False]


def adapted(start: object):
    torch.manual_seed(1)
    backbone = tiny_vit()
    config = LoraConfig(r=2, lora_alpha=2, target_modules=KEYS_AND_VALUES, init_lora_weights=start)
    if start == "corda":
        config.corda_config = CordaConfig()
        preprocess_corda(backbone, config, run_model=lambda: backbone(pixel_values=Images().images[:1]))
    return add_lae_adapters(backbone, config)


@torch.no_grad()
def states(peft_model, expert: str = "default") -> torch.Tensor:
    with active_expert(peft_model, expert):
        return peft_model.eval()(pixel_values=Images().images).last_hidden_state


@pytest.mark.parametrize("start", STARTS)
def test_the_offline_expert_leaves_the_backbone_alone(start):
    peft_model = adapted(start)
    with torch.no_grad():
        for parameter in adapter_parameters(peft_model, "default").values():
            parameter.add_(0.05)
    before = states(peft_model)
    random_state = torch.get_rng_state()
    add_expert(peft_model, "offline")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(states(peft_model), before)
    assert torch.equal(states(peft_model, "offline"), before)
    assert peft_model.peft_config["offline"].init_lora_weights == start  # what was asked for is what is saved
    assert peft_model.peft_config["default"].init_lora_weights == start


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_two_tasks_and_back_from_a_folder(start, tmp_path):
    model = LAEModel(adapted(start), IncrementalClassifier(WIDTH))
    for task in range(2):
        model.classifier.add_task(2)
        train_task(model, tmp_path / str(task), task)
    model.save_pretrained(tmp_path / "saved")
    loaded = LAEModel.from_pretrained(tiny_vit(), tmp_path / "saved")
    inputs = Images().batch()
    for expert in ("default", "offline"):
        expected = lae_predict(model, inputs, [expert])
        torch.testing.assert_close(lae_predict(loaded, inputs, [expert]), expected, rtol=0, atol=1e-6)
    assert loaded.peft_model.peft_config["offline"].init_lora_weights == start
