"""What is kept: in the Trainer's checkpoints, and in a folder of `save_pretrained`."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import TrainerCallback

from hf_stablespam.recipes.lae import IncrementalClassifier, LAEModel, lae_predict
from hf_stablespam.recipes.lae.adapters import adapter_parameters
from tests.recipes.lae.helpers import METHODS, Images, Trainer, arguments, tiny_vit, train_task, vit_model


def kept(model: LAEModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


class Stop(TrainerCallback):
    """Ends the run as a crash does, right after the checkpoint of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args, state, control, **others):
        if state.global_step == self.step:
            raise KeyboardInterrupt


# In the middle of the frozen epoch, and after it.
@pytest.mark.parametrize(("step", "optim"), [(2, "adamw_torch"), (2, "stable_spam"), (4, "stable_spam")])
def test_resuming_in_the_middle_of_a_task_equals_the_whole_run(step, optim, tmp_path):
    options = {"optim": optim, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2}
    lae = {"num_freeze_epochs": 1}
    whole = vit_model()
    for task in range(3):
        if task:
            torch.manual_seed(task)
            whole.classifier.add_task(2)
        if task == 2:
            whole.save_pretrained(tmp_path / "two_tasks")
        train_task(whole, tmp_path / f"whole{task}", task, lae=lae, **options)

    interrupted = LAEModel.from_pretrained(tiny_vit(), tmp_path / "two_tasks")
    with pytest.raises(KeyboardInterrupt):
        train_task(interrupted, tmp_path / "part", 2, (Stop(step),), lae=lae, **options)

    # A fresh process: nothing but the backbone, the configuration and the classes.
    resumed = vit_model(tasks=3, seed=0)
    checkpoint = str(tmp_path / "part" / f"checkpoint-{step}")
    trainer = train_task(resumed, tmp_path / "part", 2, resume=checkpoint, lae=lae, **options)
    assert trainer.state.global_step == 6
    assert_equal(kept(resumed), kept(whole))
    assert_equal(dict(resumed.named_parameters()), dict(whole.named_parameters()))


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_holds_what_is_learned_and_no_backbone(method, tmp_path):
    model = vit_model(method)
    train_task(model, tmp_path)
    model.classifier.add_task(2, labels=[8, 3])

    class Eights(Images):
        def __getitem__(self, index):
            item = super().__getitem__(index)
            return item | {"labels": torch.tensor([0, 0, 8, 3])[item["labels"]]}

    train_task(model, tmp_path, 1, data=Eights(1), save_strategy="epoch")
    folder = tmp_path / "checkpoint-6"
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    experts = len(adapter_parameters(model.peft_model, "default"))
    assert len([name for name in names if ".default" in name]) == experts
    assert len([name for name in names if ".offline" in name]) == experts
    assert {name for name in names if "peft_model" not in name} == {
        "tasks_trained",
        *(f"classifier.heads.{task}.{part}" for task in (0, 1) for part in ("weight", "bias", "labels")),
    }
    assert len(names) == 2 * experts + 7
    described = json.loads((folder / "lae.json").read_text())
    assert (described["task"], described["classes_per_task"], described["labels"]) == (1, [2, 2], [0, 1, 8, 3])

    batch = Images().batch()
    for source in (folder, tmp_path / "saved"):
        if source != folder:
            model.save_pretrained(source)
        loaded = LAEModel.from_pretrained(tiny_vit(), source)
        assert torch.equal(lae_predict(loaded, batch), lae_predict(model, batch))
        assert loaded.classifier.labels == [0, 1, 8, 3]
        assert not any(p.requires_grad for p in adapter_parameters(loaded.peft_model, "offline").values())
    assert int(loaded.tasks_trained) == 2


def test_the_next_task_goes_on_from_a_saved_model(tmp_path):
    results = []
    for saved in (False, True):
        model = vit_model()
        for task in range(3):
            if task:
                if saved:
                    model.save_pretrained(tmp_path / str(task))
                    model = LAEModel.from_pretrained(tiny_vit(), tmp_path / str(task))
                torch.manual_seed(task)
                model.classifier.add_task(2)
            train_task(model, tmp_path, task)
        results.append(kept(model))
    assert_equal(*results)


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    model = vit_model()
    train_task(model, tmp_path / "zero", save_strategy="epoch")
    first = str(tmp_path / "zero" / "checkpoint-3")
    with pytest.raises(ValueError, match=r"of the model are not in it, first classifier.heads.1.bias"):
        train_task(vit_model(tasks=2), tmp_path, 1, resume=first)
    model.classifier.add_task(2)
    train_task(model, tmp_path / "one", 1, save_strategy="epoch")
    second = str(tmp_path / "one" / "checkpoint-3")
    with pytest.raises(ValueError, match=r"of it not in the model, first classifier.heads.1.bias"):
        train_task(vit_model(), tmp_path, 0, resume=second)
    other = vit_model()
    other.classifier.add_task(2, labels=[6, 7])
    with pytest.raises(ValueError, match=r"classes of heads.1 are \[2, 3\], the model's \[6, 7\]"):
        train_task(other, tmp_path, 1, resume=second)
    plain, calibrated = vit_model(calibrate=False).state_dict(), vit_model()
    with pytest.raises(ValueError, match=r"not in it, first .*lora_scale"):
        calibrated.load_state_dict(plain, strict=False)


@pytest.mark.parametrize("restore", [False, True])
def test_the_count_of_steps_that_were_not_averaged_goes_on(restore, tmp_path, caplog):
    class Lost(TrainerCallback):
        """The online expert is not finite after a step, and as it was in the next."""

        def on_step_begin(self, args, state, control, model=None, **others):
            if state.global_step in (2, 5):
                model.load_state_dict(self.kept, strict=False)
            self.kept = kept(model)

        def on_optimizer_step(self, args, state, control, model=None, **others):
            if state.global_step + 1 in (2, 5):
                next(iter(adapter_parameters(model.peft_model, "default").values())).data[:] = torch.nan

    options = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3}
    options["restore_callback_states_from_checkpoint"] = restore
    first = vit_model()
    train_task(first, tmp_path / "first")
    first.classifier.add_task(2)
    train_task(first, tmp_path / "whole", 1, (Lost(),), **options)
    assert "after 2 steps the online expert was not finite" in caplog.text
    caplog.clear()
    checkpoint = str(tmp_path / "whole" / "checkpoint-3")
    train_task(vit_model(tasks=2), tmp_path / "resumed", 1, (Lost(),), resume=checkpoint, **options)
    assert "after 2 steps the online expert was not finite" in caplog.text


def test_a_checkpoint_of_a_run_without_the_callback(tmp_path):
    """Its steps are in no average from the second task on; in the first there is none."""
    options = {"save_strategy": "steps", "save_steps": 3}

    def train_without(model, folder, task):
        model.requires_grad_(False)
        model.classifier.heads[task].requires_grad_(True)
        model.peft_model.set_adapter("default")
        model.task = task
        Trainer(model, arguments(folder, **options), train_dataset=Images(task)).train()
        return str(folder / "checkpoint-3")

    checkpoint = train_without(vit_model(), tmp_path / "zero", 0)
    trainer = train_task(vit_model(), tmp_path / "zero on", 0, resume=checkpoint, **options)
    saved = json.loads((tmp_path / "zero on" / "checkpoint-6" / "trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["LAECallback"]["attributes"] == {"_skipped": 0}
    model = trainer.model
    model.classifier.add_task(2)
    train_task(model, tmp_path / "one", 1)
    model.classifier.add_task(2)
    model.save_pretrained(tmp_path / "two tasks")
    checkpoint = train_without(model, tmp_path / "two", 2)
    again = LAEModel.from_pretrained(tiny_vit(), tmp_path / "two tasks")
    with pytest.raises(ValueError, match=r"of a run with LAECallback\(task=2\), got one of step 3 whose run had none"):
        train_task(again, tmp_path / "two on", 2, resume=checkpoint, **options)


def test_heads_in_a_file_of_their_own(tmp_path):
    classifier = IncrementalClassifier(4).double()
    classifier.add_task(2, labels=[5, 1])
    classifier.double().add_task(1)
    classifier.save(tmp_path / "heads.safetensors")
    loaded = IncrementalClassifier.load(tmp_path / "heads.safetensors")
    assert loaded.labels == [5, 1, 6]
    assert loaded.classes_per_task == [2, 1]
    assert_equal(loaded.state_dict(), classifier.state_dict())
    with safe_open(tmp_path / "heads.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["lae"])["in_features"] == 4
    PeftModel.save_pretrained(vit_model().peft_model, tmp_path)
    with pytest.raises(ValueError, match=r"holds no heads of an IncrementalClassifier"):
        IncrementalClassifier.load(tmp_path / "adapter_model.safetensors")


def test_folders_that_cannot_be_loaded(tmp_path):
    with pytest.raises(ValueError, match=r"has no lae.json; name a folder that LAEModel.save_pretrained wrote"):
        LAEModel.from_pretrained(tiny_vit(), tmp_path)
    model = vit_model()
    model.pool = lambda output: output.last_hidden_state[:, 0]
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pool was a function when the model was saved; pass it again"):
        LAEModel.from_pretrained(tiny_vit(), tmp_path)
    assert LAEModel.from_pretrained(tiny_vit(), tmp_path, "cls").pool == "cls"


def test_the_best_model_is_loaded_with_both_experts(tmp_path):
    model = vit_model()
    train_task(model, tmp_path)
    model.classifier.add_task(2)

    class Evaluation(TrainerCallback):
        """Keeps what the first evaluation saw, which is made the best one."""

        def on_evaluate(self, args, state, control, metrics=None, model=None, **others):
            self.first = getattr(self, "first", None) or kept(model)
            metrics["eval_loss"] = state.global_step

    best = Evaluation()
    from hf_stablespam.recipes.lae import LAECallback

    options = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    trainer = Trainer(
        model, arguments(tmp_path, **options), train_dataset=Images(1), eval_dataset=Images(1),
        callbacks=[LAECallback(1, 0.9), best],
    )  # fmt: skip
    trainer.train()
    best.first["tasks_trained"].fill_(2)
    assert_equal(kept(model), best.first)
