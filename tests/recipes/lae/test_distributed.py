"""Two processes with DDP give what one process gives with the same global batch."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.processes import run_processes
from tests.recipes.lae.helpers import train_task, vit_model

OPTIMIZERS = ("adamw_torch", "stable_spam")
OPTIONS = {"num_train_epochs": 2, "max_grad_norm": 1.0, "gradient_accumulation_steps": 1}


def three_tasks(folder: str, batch_size: int, ddp: bool) -> None:
    """Trains three tasks with each optimizer, the first epoch frozen, and stores what was learned."""
    for optim in OPTIMIZERS:
        model = vit_model()
        for task in range(3):
            torch.manual_seed(task)
            if task:
                model.classifier.add_task(2)
            options = OPTIONS | {"per_device_train_batch_size": batch_size, "optim": optim}
            trainer = train_task(model, folder, task, lae={"num_freeze_epochs": 1}, **options)
            assert isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel) == ddp
            assert not model.stop_features_gradient
        if trainer.is_world_process_zero():
            save_file(model.state_dict(), Path(folder, f"{optim}.safetensors"))


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    run_processes(2, three_tasks, str(tmp_path / "two"), 2, True)
    three_tasks(str(tmp_path / "one"), 4, False)
    for optim in OPTIMIZERS:
        one, two = (load_file(tmp_path / name / f"{optim}.safetensors") for name in ("one", "two"))
        assert one.keys() == two.keys()
        assert any("offline" in name for name in one)
        for name in one:
            torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-5, msg=lambda text, name=name: name + text)
