"""Calibration batches from the data that a Trainer trains on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

# The published amount: 512 sequences of 64 tokens, 16 at a time.
SEQUENCES, LENGTH, BATCH = 512, 64, 16


class TrainBatches:
    """The first tokens of random training samples (see `chosen_columns`), other ones each time they are gone through.

    Draws by torch's global generator, which `adapt_prune` seeds and restores; no sampler of the Trainer moves.

    Args:
        data: a map-style data set.
        collate: makes a batch of samples, the Trainer's.
        sequences: samples in all.
        length: tokens of each.
        batch: samples per batch.

    Raises:
        ValueError: data without a length.
    """

    def __init__(
        self,
        data: Any,
        collate: Callable[[list[Any]], Mapping[str, Any]],
        sequences: int = SEQUENCES,
        length: int = LENGTH,
        batch: int = BATCH,
    ) -> None:
        if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
            raise ValueError(
                "the training data has no length, so no calibration samples can be drawn; pass calibration=[...]"
            )
        self.data, self.collate = data, collate
        self.sequences, self.length, self.batch = min(sequences, len(data)), length, batch

    @classmethod
    def of_trainer(cls, trainer: Trainer) -> TrainBatches:
        """From the data of a Trainer."""
        return cls.of_loader(trainer.get_train_dataloader())

    @classmethod
    def of_loader(cls, loader: Any) -> TrainBatches:
        """From the data of a `DataLoader`."""
        return cls(loader.dataset, loader.collate_fn)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        chosen = torch.randperm(len(self.data))[: self.sequences].tolist()
        for start in range(0, len(chosen), self.batch):
            batch = self.collate([self.data[index] for index in chosen[start : start + self.batch]])
            columns = chosen_columns(batch, self.length)
            yield {name: self._shortened(value, columns) for name, value in batch.items()}

    def _shortened(self, value: Any, columns: Tensor | None) -> Any:
        if not isinstance(value, Tensor) or value.ndim != 2:
            return value
        if columns is None or value.shape[0] != columns.shape[0] or value.shape[1] <= int(columns.max()):
            return value[:, : self.length]
        return value.gather(1, columns.to(value.device))


def chosen_columns(batch: Mapping[str, Any], length: int) -> Tensor | None:
    """Which `length` tokens in a row to take of each sample: (batch, tokens).

    From the first token that is no padding, or, where none of these has a label (a long prompt), from the one before
    the first label. Not beyond the end.

    Args:
        batch: with ``input_ids`` (batch, tokens), and ``attention_mask`` and ``labels`` where there are any.
        length: tokens to take.

    Returns:
        `None` for a batch without such ``input_ids``.
    """
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        return None
    width = min(length, ids.shape[1])
    position = torch.arange(ids.shape[1], device=ids.device)
    start = _first(_alike(batch.get("attention_mask"), ids) != 0)
    predicted = position > start.unsqueeze(1)  # all but the first
    labelled = (_alike(batch.get("labels"), ids) != -100) & predicted
    answer = _first(labelled)
    start = torch.where(labelled.any(1) & (answer >= start + width), answer - 1, start)
    return start.clamp(max=ids.shape[1] - width).unsqueeze(1) + torch.arange(width, device=ids.device)


def _alike(value: Any, ids: Tensor) -> Tensor:
    """A tensor of the batch if it is one per token, else ones."""
    return value if isinstance(value, Tensor) and value.shape == ids.shape else torch.ones_like(ids)


def _first(true: Tensor) -> Tensor:
    """The first column of each row that holds; 0 where none does."""
    return true.int().argmax(1)
