"""A classifier that grows by a head for each task."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from itertools import chain

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

INITIAL_STD = 0.001


class ClassHead(nn.Linear):
    """The logits of one task's classes. Not exactly an `nn.Linear`, so that `convert_to_4bit` leaves it alone."""

    labels: torch.Tensor

    def __init__(self, in_features: int, labels: Sequence[int], **place: object) -> None:
        super().__init__(in_features, len(labels), **place)  # type: ignore[arg-type]
        self.register_buffer("labels", torch.tensor(labels, dtype=torch.long, device=self.weight.device))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=INITIAL_STD)
        nn.init.zeros_(self.bias)


class IncrementalClassifier(nn.Module):
    """One linear head for each task; their logits side by side are those of all classes seen so far.

    A head starts with weights from N(0, 0.001²) and biases at 0, as in the official code. Columns are numbered in the
    order in which classes came; `labels` says which label of the data set a column stands for.

    Args:
        in_features: the width of the features.

    Raises:
        ValueError: fewer than one feature.

    Example:
        >>> classifier = IncrementalClassifier(16)
        >>> classifier.add_task(2)
        >>> classifier.add_task(2, labels=[7, 5])
        >>> classifier.classes_per_task, classifier.labels
        ([2, 2], [0, 1, 7, 5])
        >>> classifier(torch.zeros(3, 16)).shape, classifier(torch.zeros(3, 16), slice(1, 2)).shape
        (torch.Size([3, 4]), torch.Size([3, 2]))
    """

    def __init__(self, in_features: int) -> None:
        super().__init__()
        if in_features < 1:
            raise ValueError(f"in_features must be at least 1, got {in_features}")
        self.in_features = in_features
        self.heads = nn.ModuleList()

    def add_task(self, num_classes: int, labels: Sequence[int] | None = None) -> None:
        """Add a head, on the device and in the dtype of the last one.

        Args:
            num_classes: how many classes the task brings.
            labels: their labels in the data set, in the order of the columns; default: the next free numbers.

        Raises:
            ValueError: no classes, or labels that are too few, repeated, or of an earlier task.
        """
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        seen = self.labels
        if labels is None:
            start = max(seen, default=-1) + 1
            labels = range(start, start + num_classes)
        own = [int(label) for label in labels]
        if len(own) != num_classes or len(set(own)) != len(own):
            raise ValueError(f"labels must be {num_classes} different ones, got {own}")
        if overlap := sorted(set(own) & set(seen)):
            raise ValueError(f"labels {overlap} are classes of an earlier task already; a task brings new classes only")
        place = {"device": self.heads[-1].weight.device, "dtype": self.heads[-1].weight.dtype} if self.heads else {}
        self.heads.append(ClassHead(self.in_features, own, **place))

    def forward(
        self,
        features: torch.Tensor,  # (batch, in_features)
        tasks: slice | None = None,
    ) -> torch.Tensor:
        """Logits of the classes of `tasks`, default all: (batch, classes)."""
        heads = self._heads(tasks)
        if not heads:
            raise ValueError(f"no head for tasks {tasks} among {len(self.heads)}; call add_task first")
        return torch.cat([head(features.to(head.weight.dtype)) for head in heads], dim=-1)

    @property
    def classes_per_task(self) -> list[int]:
        """How many classes each task brought."""
        return [head.out_features for head in self._heads()]

    @property
    def labels(self) -> list[int]:
        """The label in the data set of each column."""
        return list(chain.from_iterable(head.labels.tolist() for head in self._heads()))

    def class_labels(self, tasks: slice | None = None) -> torch.Tensor:
        """The same for the columns of `tasks`, as a tensor on the heads' device."""
        return torch.cat([head.labels for head in self._heads(tasks)])

    def _heads(self, tasks: slice | None = None) -> list[ClassHead]:
        return list(self.heads[tasks] if tasks is not None else self.heads)  # type: ignore[arg-type]

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write the heads, with the classes of each, to a safetensors file."""
        described = {
            "in_features": self.in_features,
            "classes_per_task": self.classes_per_task,
            "labels": [head.labels.tolist() for head in self._heads()],
        }
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, file, metadata={"format": "pt", "lae": json.dumps(described)})

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> IncrementalClassifier:
        """The classifier that `save` wrote.

        Raises:
            ValueError: a safetensors file of something else.
        """
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            if "lae" not in metadata:
                raise ValueError(f"{file} holds no heads of an IncrementalClassifier; name the file that save() wrote")
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        described = json.loads(metadata["lae"])
        classifier = cls(described["in_features"])
        for labels in described["labels"]:
            classifier.add_task(len(labels), labels)
        if tensors:
            classifier.to(tensors["heads.0.weight"].dtype).load_state_dict(tensors)
        return classifier
