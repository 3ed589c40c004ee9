"""The frozen backbone: it stays as it is, lets the gradient through, and takes the offline expert in any dtype."""

import pytest
import torch
from peft import LNTuningConfig
from transformers import ResNetConfig, ResNetModel

from hf_stablespam.recipes.lae import (
    IncrementalClassifier,
    LAEModel,
    ParallelAdapterConfig,
    add_lae_adapters,
    lae_predict,
)
from hf_stablespam.recipes.lae.adapters import adapter_parameters, add_expert
from tests.recipes.lae.helpers import WIDTH, Images, tiny_llama, tiny_vit, train_task, vit_model


def tiny_resnet() -> ResNetModel:
    torch.manual_seed(0)
    shape = {"embedding_size": 8, "hidden_sizes": [8, WIDTH], "depths": [1, 1], "layer_type": "basic"}
    return ResNetModel(ResNetConfig(num_channels=1, **shape))


class LargerImages(Images):
    def __init__(self) -> None:
        super().__init__()
        self.images = self.images.repeat(1, 1, 4, 4)


def test_statistics_of_batch_norms_stay(tmp_path):
    backbone = tiny_resnet()
    before = {name: value.clone() for name, value in backbone.named_buffers()}
    config = ParallelAdapterConfig(target_modules=r".*stages\.0\.layers\.0")
    model = LAEModel(add_lae_adapters(backbone, config), IncrementalClassifier(WIDTH), pool="mean")
    model.classifier.add_task(2)
    train_task(model, tmp_path / "run", data=LargerImages())
    after = [*backbone.named_buffers()]
    assert len(after) == len(before) > 0
    for value, (_, same) in zip(before.values(), after, strict=True):
        assert torch.equal(value, same)
    model.save_pretrained(tmp_path / "saved")
    loaded = LAEModel.from_pretrained(tiny_resnet(), tmp_path / "saved")
    inputs = LargerImages().batch()
    torch.testing.assert_close(lae_predict(loaded, inputs), lae_predict(model, inputs))
    assert model.train().training
    assert model.peft_model.training
    assert not any(module.training for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_lets_the_online_expert_learn(reentrant, tmp_path):
    learned = []
    for options in (
        {},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}},
    ):
        model = vit_model()
        train_task(model, tmp_path, **options)
        learned.append(adapter_parameters(model.peft_model, "default"))
    for key, value in learned[0].items():
        torch.testing.assert_close(learned[1][key], value, rtol=0, atol=1e-6)
    start = adapter_parameters(vit_model().peft_model, "default")
    assert any(not torch.equal(learned[1][key], value) for key, value in start.items())


@pytest.mark.parametrize(("backbone", "norm"), [(tiny_llama, "input_layernorm"), (tiny_vit, "layernorm_before")])
def test_tuned_norms_of_a_bfloat16_model_have_an_average_in_float32(backbone, norm):
    config = LNTuningConfig(target_modules=[norm])
    experts = add_lae_adapters(backbone().to(torch.bfloat16), config, calibrate=False)
    model = LAEModel(experts, IncrementalClassifier(WIDTH), pool="mean")
    model.classifier.add_task(2)
    add_expert(experts, "offline")
    inputs = {"input_ids": torch.tensor([[3, 4, 5]])}
    if backbone is tiny_vit:
        inputs = {"pixel_values": Images().images.to(torch.bfloat16)}
    averages = adapter_parameters(experts, "offline").values()
    assert {average.dtype for average in averages} == {torch.float32}
    assert torch.equal(lae_predict(model, inputs, ["offline"]), lae_predict(model, inputs, ["default"]))
    with torch.no_grad():
        for average in averages:
            average.mul_(2)
    assert not torch.equal(lae_predict(model, inputs, ["offline"]), lae_predict(model, inputs, ["default"]))
    expected = lae_predict(model, inputs, ["offline"])
    merged = LAEModel.merge_and_unload(model, "offline").eval()
    with torch.no_grad():
        features = merged(**inputs).last_hidden_state.mean(dim=1)
    torch.testing.assert_close(model.classifier(features).float().softmax(-1), expected)
