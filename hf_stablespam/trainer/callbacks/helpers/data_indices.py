"""Which samples of the data set a training step used."""

from collections import deque
from typing import Any

from torch.utils.data import IterableDataset
from transformers import TrainingArguments

_ATTRIBUTE = "_hf_stablespam_yielded"


class DataIndices:
    """Remembers the indices that a dataloader's batch sampler gives out, until the training has used them.

    The dataloader asks for them ahead of time, so they are matched by counting: the n-th batch that the training
    uses in an epoch has the n-th indices. The batch sampler gets a subclass of its own class, whose iterator leaves
    a copy of what it yields; the order and everything else stay. Without a batch sampler (a streamed data set, or
    batches that one process hands out) the indices are not known.

    Args:
        dataloader: the Trainer's, as callbacks get it.
    """

    def __init__(self, dataloader: Any) -> None:
        streamed = isinstance(getattr(dataloader, "dataset", None), IterableDataset)
        handed_out = hasattr(dataloader, "slice_fn")  # accelerate's dispatcher
        self._sampler = None if streamed or handed_out else getattr(dataloader, "batch_sampler", None)
        self._length = len(dataloader) if self._sampler is not None else 0
        self._used = 0
        if self._sampler is not None:
            setattr(self._sampler, _ATTRIBUTE, deque())
            self._original = type(self._sampler)
            self._sampler.__class__ = _recording(self._original)

    def begin_epoch(self, args: TrainingArguments, resumed_step: int | None) -> None:
        """Start to count anew.

        Args:
            args: the Trainer's.
            resumed_step: update steps behind a run that goes on with this epoch, None where it begins the epoch.
        """
        self._used = 0
        if resumed_step is not None and self._length and not args.ignore_data_skip:
            accumulate = args.gradient_accumulation_steps
            updates = max(-(-self._length // accumulate), 1)
            self._used = resumed_step % updates * accumulate  # as many as the Trainer skips

    def take(self, batches: int) -> list[int] | None:
        """Indices of the next `batches` batches that the training used, None where they are not known."""
        yielded = getattr(self._sampler, _ATTRIBUTE, ())
        first, self._used = self._used, self._used + batches
        rows = [row for place, row in yielded if first <= place < self._used]
        while yielded and yielded[0][0] < self._used:
            yielded.popleft()
        if len(rows) != batches or not all(type(index) is int for row in rows for index in row):
            return None
        return [index for row in rows for index in row]

    def close(self) -> None:
        """Leave the batch sampler as it was found."""
        if self._sampler is not None and hasattr(self._sampler, _ATTRIBUTE):
            delattr(self._sampler, _ATTRIBUTE)
            self._sampler.__class__ = self._original


def _recording(base: type) -> type:
    def __iter__(self: Any) -> Any:
        yielded = getattr(self, _ATTRIBUTE)
        yielded.clear()
        for place, indices in enumerate(base.__iter__(self)):  # type: ignore[attr-defined]
            yielded.append((place, list(indices)))
            yield indices

    return type(base.__name__, (base,), {"__iter__": __iter__, "__module__": base.__module__})
