"""What is refused, before any training and with the remedy."""

import logging

import pytest
import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, TaskType
from torch import nn
from torch.utils.data import IterableDataset
from transformers import Trainer

from hf_stablespam.recipes.lae import (
    CalibratedPrefixConfig,
    IncrementalClassifier,
    LAECallback,
    LAEModel,
    ParallelAdapterConfig,
    add_lae_adapters,
    ensemble_probabilities,
    expert_logits,
    incremental_metrics,
    lae_predict,
    local_cross_entropy,
)
from hf_stablespam.recipes.lae.adapters import adapter_parameters, add_expert
from tests.recipes.lae.helpers import Images, arguments, lora, tiny_vit, train_task, vit_model


def two_tasks() -> IncrementalClassifier:
    classifier = IncrementalClassifier(4)
    classifier.add_task(2, labels=[3, 5])
    classifier.add_task(1)
    return classifier


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: two_tasks().add_task(2, [5, 9]), r"labels \[5\] are classes of an earlier task already"),
        (lambda: two_tasks().add_task(2, [7, 7]), r"labels must be 2 different ones, got \[7, 7\]"),
        (lambda: two_tasks().add_task(3, [7, 8]), r"labels must be 3 different ones, got \[7, 8\]"),
        (lambda: two_tasks().add_task(0), "num_classes must be at least 1, got 0"),
        (lambda: IncrementalClassifier(4)(torch.ones(1, 4)), "call add_task first"),
        (lambda: IncrementalClassifier(0), "in_features must be at least 1"),
        (lambda: LAECallback(0, ema_decay=1.0), r"ema_decay must be in \[0, 1\), got 1.0"),
        (lambda: LAECallback(0, ema_decay=-0.1), r"ema_decay must be in \[0, 1\), got -0.1"),
        (lambda: LAECallback(-1), "task must be 0 or more, got -1"),
        (lambda: LAECallback(0, num_freeze_epochs=-1), "num_freeze_epochs must be 0 or more"),
        (lambda: LAECallback(0, online="x", offline="x"), "two adapters, got 'x' for both"),
        (lambda: ParallelAdapterConfig(down_sample=0), r"down_sample must be an int from 1 on.*got 0"),
        (lambda: ParallelAdapterConfig(down_sample=1.5), r"float in \(0, 1\] as a share of the width, got 1.5"),
        (lambda: CalibratedPrefixConfig(num_virtual_tokens=0), "num_virtual_tokens must be at least 1, got 0"),
        (lambda: add_lae_adapters(tiny_vit(), IA3Config(target_modules=["k_proj"], feedforward_modules=[])),
         "calibrate=True knows LoraConfig.*got IA3Config; pass calibrate=False"),
        (lambda: add_lae_adapters(tiny_vit(), LoraConfig(target_modules=["k_proj"], use_dora=True)), "plain LoRA"),
        (lambda: add_lae_adapters(tiny_vit(), LoraConfig(target_modules=["k_proj", "projection"])),
         r"scales LoRA on nn.Linear only, got .*projection \(Conv2d\)"),
        (lambda: add_lae_adapters(tiny_vit(), PrefixTuningConfig(num_virtual_tokens=2)), "CalibratedPrefixConfig"),
        (lambda: add_lae_adapters(tiny_vit(), LoraConfig(task_type=TaskType.SEQ_CLS)), "leave both out"),
        (lambda: add_lae_adapters(tiny_vit(), LoraConfig(target_modules=["k_proj"], bias="lora_only")),
         "bias must be 'none', got 'lora_only': the backbone's own biases belong to no expert"),
        (lambda: add_lae_adapters(add_lae_adapters(tiny_vit(), lora()), lora()), "has PEFT adapters already"),
        (lambda: add_lae_adapters(tiny_vit(), ParallelAdapterConfig(target_modules=["layernorm"])),
         "LayerNorm has no linear layer"),
        (lambda: add_lae_adapters(tiny_vit(), CalibratedPrefixConfig(target_modules=["mlp"])), "has no key projection"),
        (lambda: LAEModel(tiny_vit(), IncrementalClassifier(4)), "must come from add_lae_adapters, got ViTModel"),
        (lambda: LAEModel(add_lae_adapters(tiny_vit(), lora()), IncrementalClassifier(4), "max"), "pool must be"),
        (lambda: ensemble_probabilities(), "at least one expert"),
        (lambda: incremental_metrics([]), "no rows"),
        (lambda: incremental_metrics([[1.0], [1.0]]), "row 1 needs 2 accuracies, got 1"),
        (lambda: incremental_metrics([[1.0]], [0]), "samples_per_task must be 1 positive numbers"),
        (lambda: local_cross_entropy({"logits": torch.zeros(1, 2)}, torch.tensor([2])), r"labels \[2\] are not among"),
        (lambda: local_cross_entropy(object(), torch.tensor([2])), "outputs must have logits, got object"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def trainer_of(model, tmp_path, callback, **options):
    return Trainer(model, arguments(tmp_path, **options), train_dataset=Images(callback.task), callbacks=[callback])


@pytest.mark.parametrize(
    ("model", "callback", "message"),
    [
        (lambda: tiny_vit(), LAECallback(0), "needs an LAEModel, got ViTModel"),
        (lambda: vit_model(), LAECallback(1), "below the number of heads, 1, got 1; call classifier.add_task first"),
        (lambda: vit_model(), LAECallback(0, online="mine"), r"no adapter 'mine', only \['default'\]"),
    ],
)
def test_a_trainer_that_is_not_made(model, callback, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer_of(model(), tmp_path, callback)


def test_sharded_parameters_are_refused(tmp_path, monkeypatch):
    model = vit_model()
    monkeypatch.setattr("hf_stablespam.recipes.lae.checks.fsdp_version", lambda args: 2)
    with pytest.raises(ValueError, match="does not work with FSDP or DeepSpeed ZeRO; use DDP"):
        trainer_of(model, tmp_path, LAECallback(0))


def test_the_trainers_own_smoothed_loss_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"label_smoothing_factor must be 0, got 0.1"):
        trainer_of(vit_model(), tmp_path, LAECallback(0), label_smoothing_factor=0.1)


def test_a_task_is_trained_once(tmp_path):
    model = vit_model()
    train_task(model, tmp_path)
    with pytest.raises(ValueError, match="task 0 was trained already, 1 tasks are; take the next number"):
        train_task(model, tmp_path)


def test_a_later_task_needs_the_experts_of_earlier_ones(tmp_path):
    trainer = trainer_of(vit_model(tasks=3), tmp_path, LAECallback(2))
    with pytest.raises(ValueError, match=r"no adapter 'offline' from earlier tasks, only \['default'\]"):
        trainer.train()


def test_an_epoch_must_be_left_for_the_online_expert(tmp_path):
    trainer = trainer_of(vit_model(tasks=2), tmp_path, LAECallback(1, num_freeze_epochs=2))
    with pytest.raises(ValueError, match="num_freeze_epochs must be below the 2 epochs of this run, got 2"):
        trainer.train()
    assert vit_model()  # task 0 is never frozen
    trainer_of(vit_model(), tmp_path, LAECallback(0, num_freeze_epochs=2)).train()


class Stream(IterableDataset):
    """The images of a task, without a length."""

    def __init__(self, task):
        self.rows = Images(task)

    def __iter__(self):
        yield from (self.rows[index] for index in range(len(self.rows)))


def test_freezing_needs_epochs_that_can_be_counted(tmp_path):
    def trainer(task, epochs):
        callback = LAECallback(task, 0.9, num_freeze_epochs=epochs)
        model = vit_model(tasks=2)
        return Trainer(model, arguments(tmp_path, max_steps=4), train_dataset=Stream(task), callbacks=[callback])

    with pytest.raises(ValueError, match=r"num_freeze_epochs=1 counts epochs.*no length.*num_freeze_epochs=0"):
        trainer(1, 1).train()
    trainer(1, 0).train()
    trainer(0, 1).train()  # task 0 is never frozen


def test_adapters_of_two_shapes(tmp_path):
    model = vit_model(tasks=2)
    model.peft_model.add_adapter("offline", lora(rank=3))
    with pytest.raises(ValueError, match=r"'default' and 'offline' differ in \d+ parameters, first .*lora"):
        trainer_of(model, tmp_path, LAECallback(1)).train()


def test_an_offline_expert_that_could_learn_is_frozen_with_a_warning(tmp_path, caplog):
    model = vit_model(tasks=2)
    add_expert(model.peft_model, "offline")
    for parameter in adapter_parameters(model.peft_model, "offline").values():
        parameter.requires_grad_(True)
    with caplog.at_level(logging.WARNING):
        trainer_of(model, tmp_path, LAECallback(1))
    assert "'offline' was trainable; it is averaged, not trained" in caplog.text
    assert not any(p.requires_grad for p in adapter_parameters(model.peft_model, "offline").values())


def test_all_trainers_made_in_advance_is_noticed(tmp_path):
    model = vit_model(tasks=2)
    first = trainer_of(model, tmp_path, LAECallback(0))
    first.create_optimizer()
    trainer_of(model, tmp_path, LAECallback(1)).train()
    with pytest.raises(ValueError, match="task 0 was trained already"):
        first.train()
    model = vit_model(tasks=2)
    second = trainer_of(model, tmp_path, LAECallback(1))
    second.create_optimizer()
    train_task(model, tmp_path)
    second.optimizer.param_groups[0]["params"].append(nn.Parameter(torch.zeros(1)))
    with pytest.raises(ValueError, match=r"holds other parameters than those of this task .* 1 others are"):
        second.train()


def test_samples_of_another_task_are_noticed(tmp_path):
    with pytest.raises(ValueError, match=r"labels \[2, 3\] are not among the classes \[0, 1\] that this loss is over"):
        train_task(vit_model(), tmp_path, data=Images(1), per_device_train_batch_size=12)


def test_prediction_before_the_second_task_and_with_a_wrong_name(tmp_path):
    model = vit_model()
    inputs = Images().batch()
    train_task(model, tmp_path)
    alone = lae_predict(model, inputs)
    assert torch.equal(alone, lae_predict(model, inputs, experts=("default",)))
    torch.testing.assert_close(alone.sum(-1), torch.ones(12))
    model.classifier.add_task(2)
    train_task(model, tmp_path, 1)
    with pytest.raises(ValueError, match=r"among the model's adapters \['default', 'offline'\], got \('of',\)"):
        lae_predict(model, inputs, experts=("of",))
    with pytest.raises(ValueError, match="among the model's adapters"):
        expert_logits(model, inputs, experts=())


def test_merging_asks_which_expert(tmp_path):
    model = vit_model()
    train_task(model, tmp_path)
    model.classifier.add_task(2)
    train_task(model, tmp_path, 1)
    with pytest.raises(ValueError, match=r"would destroy one of the experts \['default', 'offline'\]; choose"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="no expert 'x'"):
        model.merge_and_unload("x")
    expected = expert_features(model, "offline")
    merged = model.merge_and_unload("offline").eval()
    actual = merged(pixel_values=Images().images).last_hidden_state[:, 0]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="not linear and cannot be merged"):
        vit_model("adapter").merge_and_unload("default")
    with pytest.raises(ValueError, match="prefix cannot be merged"):
        vit_model("prefix").merge_and_unload("default")


def expert_features(model, name):
    from hf_stablespam.recipes.lae.adapters import active_expert

    with active_expert(model.peft_model, name), torch.no_grad():
        return model.eval().features(pixel_values=Images().images)
