"""A Trainer run begun with another optimizer and resumed with `optim="stable_spam"`: it goes on, or says why not."""

import logging

import pytest
import torch

import hf_stablespam  # noqa: F401 (registers the optimizer)
from tests.trainer.helpers import optimizer_of, tiny_trainer, training_logs


def checkpoint(tmp_path, **options):
    """A run of six steps with a checkpoint after the third."""
    trainer = tiny_trainer(tmp_path, save_strategy="steps", save_steps=3, **options)
    trainer.train()
    return str(tmp_path / "checkpoint-3"), training_logs(trainer)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_a_run_begun_with_adamw_goes_on_and_says_so_in_one_line(tmp_path, optim, caplog):
    path, before = checkpoint(tmp_path, optim=optim)
    resumed = tiny_trainer(tmp_path / "resumed")
    with caplog.at_level(logging.WARNING, logger="hf_stablespam"):
        resumed.train(resume_from_checkpoint=path)
    said = [record.getMessage() for record in caplog.records if "AdamW run" in record.getMessage()]
    assert said == [
        "StableSPAM goes on from step 3 of an AdamW run: its moments are kept and rescaled at the next step, "
        "the trackers of AdaClip and AdaGN start fresh"
    ]
    optimizer = optimizer_of(resumed)
    assert {int(state["step"]) for state in optimizer.state.values()} == {6}
    assert {int(state["adopted_at"]) for state in optimizer.state.values()} == {3}
    (clip_beta,) = {group["clip_beta"] for group in optimizer.param_groups}
    assert clip_beta == 0.999
    assert all(group["decay_steps"] == 6 for group in optimizer.param_groups)
    after = training_logs(resumed)
    assert after[3]["loss"] == pytest.approx(before[3]["loss"], abs=1e-3)  # the same batch before the first own step
    assert after[5]["loss"] == pytest.approx(before[5]["loss"], abs=0.05)


def test_a_run_begun_with_rmsprop_is_refused_by_the_names_of_what_is_missing(tmp_path):
    path, _ = checkpoint(tmp_path, optim="rmsprop")
    with pytest.raises(ValueError, match=r"state of parameter 0 must hold step, .*lacks moment_step"):
        tiny_trainer(tmp_path / "resumed").train(resume_from_checkpoint=path)


def test_a_run_begun_with_amsgrad_is_refused(tmp_path):
    path, _ = checkpoint(tmp_path, optim="adamw_torch")
    file = f"{path}/optimizer.pt"
    saved = torch.load(file, weights_only=True)
    for state in saved["state"].values():
        state["max_exp_avg_sq"] = state["exp_avg_sq"].clone()
    torch.save(saved, file)
    with pytest.raises(ValueError, match=r"amsgrad=True \(it holds max_exp_avg_sq\)"):
        tiny_trainer(tmp_path / "resumed").train(resume_from_checkpoint=path)
