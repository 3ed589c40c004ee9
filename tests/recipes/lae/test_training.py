"""LAE in the Trainer: what changes in a task, and what does not."""

import pytest
import torch
from transformers import Trainer, TrainerCallback

from hf_stablespam import FourBitCallback, FourBitConfig
from hf_stablespam.recipes.lae import LAECallback, LAEModel, local_cross_entropy
from hf_stablespam.recipes.lae.adapters import adapter_parameters, add_expert
from tests.recipes.lae.helpers import METHODS, Images, arguments, train_task, vit_model


def copies(model: LAEModel, name: str) -> dict[str, torch.Tensor]:
    return {key: value.detach().clone() for key, value in adapter_parameters(model.peft_model, name).items()}


def everything(model: LAEModel) -> dict[str, torch.Tensor]:
    """All parameters, those of the backbone included."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


class Record(TrainerCallback):
    """Copies of both experts after each step; goes after LAECallback."""

    def __init__(self) -> None:
        self.online: list[dict[str, torch.Tensor]] = []
        self.offline: list[dict[str, torch.Tensor]] = []

    def on_train_begin(self, args, state, control, model=None, **others):
        self.on_step_end(args, state, control, model=model)

    def on_step_end(self, args, state, control, model=None, **others):
        self.online.append(copies(model, "default"))
        self.offline.append(copies(model, "offline") if "offline" in model.peft_model.peft_config else {})


@pytest.mark.parametrize(("method", "decay"), [("lora", 0.0), ("lora", 0.9), ("adapter", 0.9), ("prefix", 0.9)])
def test_the_offline_expert_has_the_closed_form(method, decay, tmp_path):
    model = vit_model(method)
    train_task(model, tmp_path)
    model.classifier.add_task(2)
    record = Record()
    train_task(model, tmp_path, 1, (record,), lae={"ema_decay": decay})
    assert len(record.online) == 7
    assert same(record.offline[0], record.online[0])  # a copy at the start of task 1
    for step in range(1, 7):
        for key, offline in record.offline[step].items():
            expected = decay**step * record.offline[0][key].double() + sum(
                (1 - decay) * decay ** (step - i) * record.online[i][key].double() for i in range(1, step + 1)
            )
            torch.testing.assert_close(offline.double(), expected, rtol=0, atol=1e-6)
            assert decay > 0 or torch.equal(offline, record.online[step][key])
        assert decay == 0 or not same(record.offline[step], record.offline[step - 1])


def test_an_average_of_almost_one_stays(tmp_path, caplog):
    model = vit_model(tasks=1)
    train_task(model, tmp_path)
    model.classifier.add_task(2)
    record = Record()
    train_task(model, tmp_path, 1, (record,), lae={"ema_decay": 1 - 1e-9})
    for key, value in record.offline[0].items():
        torch.testing.assert_close(record.offline[-1][key], value, rtol=0, atol=1e-8)
    assert not same(record.online[0], record.online[-1])
    assert "leaves 100.0 % of the offline expert as it was after the 6 steps" in caplog.text


@pytest.mark.parametrize("optim", ["adamw_torch", "stable_spam", "sgd"])
def test_frozen_epochs_change_nothing_but_the_new_head(optim, tmp_path):
    model = vit_model()
    train_task(model, tmp_path, optim=optim)
    model.classifier.add_task(2)
    before = everything(model)

    class AfterEpoch(TrainerCallback):
        def on_train_begin(self, args, state, control, **others):
            self.states = []

        def on_epoch_end(self, args, state, control, model=None, **others):
            self.states.append(everything(model))

    after = AfterEpoch()
    train_task(model, tmp_path, 1, (after,), lae={"num_freeze_epochs": 2}, num_train_epochs=3, optim=optim)
    frozen, unfrozen = after.states[1], after.states[2]
    changed = {name for name in before if not torch.equal(before[name], frozen[name])}
    assert changed == {"classifier.heads.1.weight", "classifier.heads.1.bias"}
    changed = {name for name in before if not torch.equal(before[name], unfrozen[name])}
    assert {name for name in changed if "lora_B.default" in name}
    assert not [name for name in changed if "heads.0" in name or "base_layer" in name]


@pytest.mark.parametrize("optim", ["adamw_torch", "stable_spam"])
def test_a_task_has_an_optimizer_of_its_own_and_leaves_old_heads(optim, tmp_path):
    model = vit_model()
    steps = []
    for task in range(3):
        if task:
            model.classifier.add_task(2)
        before = everything(model)
        trainer = train_task(model, tmp_path, task, optim=optim, weight_decay=0.1)
        held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
        names = {name for name, parameter in model.named_parameters() if id(parameter) in held}
        assert names == {name for name in before if f"heads.{task}" in name or ".default" in name}
        after = everything(model)
        for name in before:
            assert torch.equal(before[name], after[name]) or name in names or ".offline" in name, name
        steps.append(trainer.state.global_step)
    assert steps == [6, 6, 6]
    assert int(model.tasks_trained) == 3


def test_four_bit_backbone_keeps_adapters_and_heads_in_full_precision(tmp_path):
    for method in METHODS:
        model = vit_model(method)
        callback = FourBitCallback(FourBitConfig(group_size=16))
        trainer = train_task(model, tmp_path, callbacks=(callback,), optim="stable_spam")
        kinds = {name: type(module).__name__ for name, module in model.named_modules()}
        converted = [name for name, kind in kinds.items() if kind == "FourBitLinear"]
        assert len(converted) == 12, method  # q, k, v, o and two of the MLP, in each of two layers
        assert not [name for name in converted if "lora" in name or "parallel_adapter" in name or "heads" in name]
        model.classifier.add_task(2)
        loss = train_task(model, tmp_path, 1, (callback,)).state.log_history[-1]["train_loss"]
        assert 0 < loss < trainer.state.log_history[-1]["train_loss"] + 1


def test_micro_batches_count_as_one_step_for_average_and_loss(tmp_path):
    results = []
    for options in ({"per_device_train_batch_size": 4}, {"per_device_train_batch_size": 2}):
        model = vit_model()
        accumulation = 4 // options["per_device_train_batch_size"]
        for task in range(2):
            if task:
                torch.manual_seed(1)
                model.classifier.add_task(2)
            train_task(model, tmp_path, task, gradient_accumulation_steps=accumulation, **options)
        results.append((copies(model, "default"), copies(model, "offline")))
    for left, right in zip(*results, strict=True):
        for key in left:
            torch.testing.assert_close(left[key], right[key], rtol=0, atol=1e-5)


def test_the_loss_function_of_the_trainer_is_the_models_own(tmp_path):
    losses = []
    for function in (None, local_cross_entropy):
        model = vit_model(tasks=2)
        trainer = Trainer(
            model,
            arguments(tmp_path, gradient_accumulation_steps=2, eval_strategy="epoch"),
            train_dataset=Images(1),
            eval_dataset=Images(0),
            compute_loss_func=function,
            callbacks=[LAECallback(1, 0.9)],
        )
        trainer.train()
        losses.append([entry for entry in trainer.state.log_history if "eval_loss" in entry][-1]["eval_loss"])
        assert trainer.predict(Images(0)).predictions.shape == (12, 4)  # an array: `classes` is left out
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_step_with_a_non_finite_expert_is_left_out_of_the_average(tmp_path, caplog):
    model = vit_model(tasks=2)

    class Break(TrainerCallback):
        """Makes the online expert infinite for one step."""

        def on_optimizer_step(self, args, state, control, model=None, **others):
            parameter = next(iter(adapter_parameters(model.peft_model, "default").values()))
            if state.global_step == 2:
                self.kept = parameter.detach().clone()
                parameter.data.view(-1)[0] = torch.inf

        def on_step_end(self, args, state, control, model=None, **others):
            if state.global_step == 3:
                next(iter(adapter_parameters(model.peft_model, "default").values())).data.copy_(self.kept)

    record, callback = Record(), LAECallback(1, 0.5)
    trainer = Trainer(
        model, arguments(tmp_path), train_dataset=Images(1), callbacks=[callback, Break(), record]
    )  # fmt: skip
    trainer.train()
    assert callback.skipped_updates == 1
    assert same(record.offline[3], record.offline[2])
    assert not same(record.offline[4], record.offline[3])
    assert "after 1 steps the online expert was not finite" in caplog.text
    assert all(value.isfinite().all() for value in record.offline[-1].values())


@pytest.mark.parametrize("method", METHODS)
def test_autocast_trains_every_method(method, tmp_path):
    model = vit_model(method, tasks=2)
    before = copies(model, "default")
    trainer = train_task(model, tmp_path, 1, bf16=True, lae={"num_freeze_epochs": 1})
    assert 0 < trainer.state.log_history[-1]["train_loss"] < 2
    assert not same(copies(model, "default"), before)


def test_a_bfloat16_expert_is_averaged_in_float32(tmp_path):
    model = vit_model()
    model.peft_model.to(torch.bfloat16)
    add_expert(model.peft_model, "offline")
    online = adapter_parameters(model.peft_model, "default")
    offline = adapter_parameters(model.peft_model, "offline")
    assert {value.dtype for value in online.values()} == {torch.bfloat16}
    assert {value.dtype for value in offline.values()} == {torch.float32}
    model.classifier.add_task(2)
    record = Record()
    train_task(model, tmp_path, 1, (record,), lae={"ema_decay": 0.999})
    assert not same(record.offline[1], record.offline[2])
    with torch.no_grad():
        assert model.eval()(pixel_values=Images(0).images).logits.isfinite().all()
