"""Prediction with two experts, metrics, and other backbones than ViT."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from hf_stablespam.recipes.lae import (
    CalibratedPrefixConfig,
    IncrementalClassifier,
    LAEModel,
    accuracy_per_task,
    add_lae_adapters,
    ensemble_probabilities,
    expert_logits,
    incremental_metrics,
    lae_predict,
    score_dataset,
)
from hf_stablespam.recipes.lae.adapters import add_expert
from tests.recipes.lae.helpers import WIDTH, Images, lora, tiny_bert, tiny_llama, tiny_vit, train_task, vit_model


def test_two_equal_experts_are_one(tmp_path):
    model = vit_model(tasks=2)
    add_expert(model.peft_model, "offline")
    one = lae_predict(model, Images().batch(), experts=("default",))
    assert torch.equal(lae_predict(model, Images().batch()), one)


def test_the_ensemble_is_the_larger_probability_and_leaves_no_trace(tmp_path):
    model = vit_model()
    train_task(model, tmp_path)
    model.classifier.add_task(2)
    train_task(model, tmp_path, 1)
    model.train()
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    batch = Images(1).batch()
    logits = expert_logits(model, batch)
    assert list(logits) == ["default", "offline"]
    probabilities = lae_predict(model, batch)
    assert torch.equal(probabilities, torch.maximum(logits["default"].softmax(-1), logits["offline"].softmax(-1)))
    assert probabilities.shape == (12, 4)
    assert model.training
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert model.peft_model.active_adapters == ["default"]
    scores, columns = score_dataset(model, DataLoader(Images(1), batch_size=5))
    torch.testing.assert_close(scores["ensemble"], probabilities)
    assert torch.equal(columns, batch["labels"])


def test_permuting_the_classes_of_a_task_permutes_predictions(tmp_path):
    results = []
    for order in ([4, 9, 6], [6, 4, 9]):
        model = vit_model(tasks=0)
        torch.manual_seed(5)
        model.classifier.add_task(3, labels=order)
        if order[0] == 6:  # the same start for the same class
            for parameter in model.classifier.parameters():
                parameter.data = parameter.data[[2, 0, 1]]

        class Labelled(Images):
            def __getitem__(self, index):
                item = super().__getitem__(index)
                return item | {"labels": torch.tensor([4, 9, 6])[item["labels"]]}

        train_task(model, tmp_path, data=Labelled(classes=3))
        results.append(lae_predict(model, Images().batch()))
        assert model.classifier.labels == order
    torch.testing.assert_close(results[1], results[0][:, [2, 0, 1]], rtol=0, atol=1e-6)


class Sentences(Dataset):
    """Tokens of which the third says the class; half of the sentences are padded."""

    def __init__(self, task: int) -> None:
        generator = torch.Generator().manual_seed(task)
        self.labels = torch.arange(12) % 2 + 2 * task
        self.tokens = torch.randint(20, 40, (12, 6), generator=generator)
        self.tokens[:, 2] = self.labels + 1
        self.mask = torch.ones_like(self.tokens)
        self.mask[::2, 4:] = 0

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {
            "input_ids": self.tokens[index],
            "attention_mask": self.mask[index],
            "labels": self.labels[index],
        }


@pytest.mark.parametrize(
    ("backbone", "pool", "config"),
    [
        (tiny_bert, "mean", lora),
        (tiny_bert, "cls", CalibratedPrefixConfig),
        (tiny_llama, "last", lora),
        (tiny_llama, lambda output: output.last_hidden_state.mean(1), CalibratedPrefixConfig),
    ],
    ids=["bert-lora", "bert-prefix", "llama-lora", "llama-prefix"],
)
def test_text_models_learn_two_tasks(backbone, pool, config, tmp_path):
    model = LAEModel(add_lae_adapters(backbone(), config()), IncrementalClassifier(WIDTH), pool)
    for task in range(2):
        model.classifier.add_task(2)
        options = {"num_train_epochs": 12, "learning_rate": 0.02, "per_device_train_batch_size": 12}
        train_task(model, tmp_path, task, data=Sentences(task), **options)
    scores, columns = score_dataset(model, DataLoader(Sentences(1), batch_size=12))
    assert scores["ensemble"].shape == (12, 4)
    (_, own) = accuracy_per_task(scores["ensemble"], columns, [2, 2], among_own_classes=True)
    assert own > 0.7  # chance is 0.5


def test_features_of_padded_tokens_do_not_count():
    model = LAEModel(add_lae_adapters(tiny_bert(), lora()), IncrementalClassifier(WIDTH), "mean").eval()
    tokens = torch.arange(1, 13).view(2, 6)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]] * 2)
    for pool, model_of in (("mean", tiny_bert), ("last", tiny_llama)):
        model = LAEModel(add_lae_adapters(model_of(), lora()), IncrementalClassifier(WIDTH), pool).eval()
        padded = model.features(input_ids=tokens, attention_mask=mask)
        short = model.features(input_ids=tokens[:, :4], attention_mask=mask[:, :4])
        unmasked = model.features(input_ids=tokens[:, :4])
        torch.testing.assert_close(padded, short, rtol=0, atol=1e-5)
        torch.testing.assert_close(padded, unmasked, rtol=0, atol=1e-5)


def test_a_backbone_of_ones_own():
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, WIDTH))
    from peft import LoraConfig

    model = LAEModel(
        add_lae_adapters(backbone, LoraConfig(r=2, target_modules=["1"])), IncrementalClassifier(WIDTH), lambda x: x
    )
    model.classifier.add_task(2)
    assert model.backbone is backbone
    with pytest.raises(TypeError):
        model(pixel_values=torch.zeros(2, 1, 8, 8))  # the backbone's own names are the inputs' names
    assert model(input=torch.zeros(2, 1, 8, 8)).logits.shape == (2, 2)


def test_a_model_with_a_head_is_used_without_it():
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    model = LAEModel(add_lae_adapters(ViTForImageClassification(config), lora()), IncrementalClassifier(WIDTH))
    model.classifier.add_task(3)
    assert model(pixel_values=torch.zeros(2, 3, 8, 8)).logits.shape == (2, 3)


def test_metrics():
    matrix = [[0.9, 0, 0], [0.5, 0.8, 0], [0.6, 0.4, 0.7]]
    last, average, forgetting = incremental_metrics(matrix)
    assert last == pytest.approx((0.6 + 0.4 + 0.7) / 3)
    assert average == pytest.approx((0.9 + (0.5 + 0.8) / 2 + last) / 3)
    assert forgetting == pytest.approx((0.3 + 0.4 + 0.0) / 3)
    weighted = incremental_metrics(matrix, samples_per_task=[1, 2, 1])
    assert weighted.last == pytest.approx((0.6 + 2 * 0.4 + 0.7) / 4)


def test_probabilities_of_half_precision_are_float32():
    assert ensemble_probabilities(torch.zeros(1, 2, dtype=torch.bfloat16)).dtype == torch.float32
    assert ensemble_probabilities(torch.zeros(1, 2, dtype=torch.float64)).dtype == torch.float64


def test_gradient_checkpointing_gives_the_same_gradients(tmp_path):
    gradients = []
    for checkpointing in (False, True):
        model = LAEModel(add_lae_adapters(tiny_vit(), lora()), IncrementalClassifier(WIDTH))
        torch.manual_seed(2)
        model.classifier.add_task(2)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()(**Images().batch()).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for left, right in zip(*gradients, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-7)
