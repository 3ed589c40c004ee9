"""Calibration on the training data: every sample gives tokens that are real, and labels where it has any."""

import torch
from torch.utils.data import DataLoader, default_collate

from hf_stablespam.recipes.adapt_pruner import AdaptPruneCallback
from hf_stablespam.recipes.adapt_pruner.training.train_batches import TrainBatches
from tests.recipes.adapt_pruner.models import small
from tests.trainer.helpers import tiny_trainer

LENGTH, WINDOW = 40, 16


def sample(padding: int = 0, prompt: int = 0, **others) -> dict:
    """`padding` tokens on the left, then a prompt without labels, then an answer."""
    position = torch.arange(LENGTH)
    ids = position + 1
    labels = torch.where(position < padding + prompt, -100, ids)
    return {"input_ids": ids, "attention_mask": (position >= padding).long(), "labels": labels, **others}


def windows(rows: list, length: int = WINDOW) -> list[list[int]]:
    """First and last token, and labels that count, of each row of the batch."""
    batch = next(iter(TrainBatches(rows, default_collate, length=length, batch=len(rows))))
    order = batch["input_ids"][:, 0].argsort()
    found = []
    for ids, mask, labels in zip(
        *(batch[key][order] for key in ("input_ids", "attention_mask", "labels")), strict=True
    ):
        assert (labels[labels != -100] == ids[labels != -100]).all()  # cut alike
        found.append([int(ids[0]), int(ids[-1]), int((labels[1:] != -100).sum()), int(mask.sum())])
    return found


def test_whole_samples_begin_at_their_beginning():
    assert windows([sample()]) == [[1, 16, 15, 16]]
    assert windows([sample(prompt=5)]) == [[1, 16, 11, 16]]
    assert windows([sample()], length=64) == [[1, 40, 39, 40]]


def test_padding_on_the_left_is_passed_over():
    assert windows([sample(padding=20), sample(padding=0)]) == [[1, 16, 15, 16], [21, 36, 15, 16]]
    assert windows([sample(padding=30)]) == [[25, 40, 10, 10]]  # no more tokens than there are


def test_a_prompt_longer_than_the_window_is_passed_over():
    assert windows([sample(prompt=20)]) == [[20, 35, 15, 16]]  # the first answer token and what it is predicted from
    assert windows([sample(padding=3, prompt=15)]) == [[4, 19, 1, 16]]  # one label is in it
    assert windows([sample(padding=3, prompt=16)]) == [[19, 34, 15, 16]]
    assert windows([sample(prompt=LENGTH - 1)]) == [[25, 40, 1, 16]]
    assert windows([sample(prompt=LENGTH)]) == [[1, 16, 0, 16]]  # no label at all


def test_without_mask_or_labels_and_with_other_tensors():
    rows = [{"input_ids": torch.arange(LENGTH), "position_ids": torch.arange(LENGTH), "features": torch.ones(70)}]
    batch = next(iter(TrainBatches(rows, default_collate, length=WINDOW)))
    assert torch.equal(batch["position_ids"], torch.arange(WINDOW)[None])
    assert batch["features"].shape == (1, WINDOW)
    mask = sample(padding=20)["attention_mask"]
    batch = next(iter(TrainBatches([{**rows[0], "attention_mask": mask}], default_collate, length=WINDOW)))
    assert torch.equal(batch["position_ids"], torch.arange(20, 36)[None])


def long(padding: int = 0, prompt: int = 0) -> dict:
    position = torch.arange(90)
    labels = torch.where(position < padding + prompt, -100, position.clamp(max=63))
    return {"input_ids": position, "attention_mask": (position >= padding).long(), "labels": labels}


def test_a_run_on_long_prompts_and_left_padding(tmp_path):
    rows = [{key: value.clamp(max=63) for key, value in row.items()} for row in [long(padding=66), long(prompt=70)] * 6]
    callback = AdaptPruneCallback(0.9, at_steps=[2], steps=20)
    trainer = tiny_trainer(tmp_path, model=small(max_position_embeddings=128), callbacks=[callback], max_steps=3)
    trainer.train_dataset = rows
    trainer.train()
    assert callback.reports[0].reached
    assert all(step.loss > 0 for step in callback.reports[0].steps)


def test_the_loader_s_data():
    loader = DataLoader([sample(padding=20)] * 3, batch_size=2)
    assert len(next(iter(TrainBatches.of_loader(loader)))["input_ids"]) == 3
