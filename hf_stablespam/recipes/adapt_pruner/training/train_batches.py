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
    """The first tokens of random training samples, other ones each time they are gone through.

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
            yield {name: self._shortened(value) for name, value in batch.items()}

    def _shortened(self, value: Any) -> Any:
        return value[:, : self.length] if isinstance(value, Tensor) and value.ndim == 2 else value
