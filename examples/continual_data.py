"""Images for class-incremental learning: classes are dealt out to tasks, embedded digits or a data set of the hub."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Image, load_dataset
from torch.utils.data import Dataset

PRETRAINING, TRAINING = 700, 700  # digits; the other 397 are the test


@dataclass
class Task:
    """What one task brings: its classes, in the order of the logits, and images of them."""

    labels: list[int]
    train: Dataset
    test: Dataset


class Tensors(Dataset):
    """Images and labels as a model takes them."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}

    def of_classes(self, labels: Sequence[int]) -> Tensors:
        chosen = torch.isin(self.labels, torch.tensor(labels))
        return Tensors(self.images[chosen], self.labels[chosen])


def deal(labels: Sequence[int], classes_per_task: int, seed: int) -> list[list[int]]:
    """The labels in a random order, so many to a task; the last task may have fewer."""
    order = [labels[i] for i in np.random.default_rng(seed).permutation(len(labels))]
    return [order[i : i + classes_per_task] for i in range(0, len(order), classes_per_task)]


def load_digits(seed: int) -> tuple[Tensors, Tensors, Tensors]:
    """Digits to pretrain on, turned by 90, 180 and 270 degrees (30 classes), and upright ones to learn and to test."""
    try:
        from sklearn import datasets
    except ModuleNotFoundError as error:
        raise SystemExit("the embedded digits come with scikit-learn: pip install scikit-learn") from error
    digits = datasets.load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    images = torch.tensor(digits.images[order] / 16, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(digits.target[order])
    turned = [images[:PRETRAINING].rot90(turns, (2, 3)) for turns in (1, 2, 3)]
    turned_labels = [labels[:PRETRAINING] + 10 * (turns - 1) for turns in (1, 2, 3)]
    rest = slice(PRETRAINING, PRETRAINING + TRAINING), slice(PRETRAINING + TRAINING, None)
    return Tensors(torch.cat(turned), torch.cat(turned_labels)), *(Tensors(images[part], labels[part]) for part in rest)


def digit_tasks(seed: int, classes_per_task: int) -> tuple[Tensors, list[Task]]:
    """Digits to pretrain on, and tasks of upright digits."""
    pretraining, train, test = load_digits(seed)
    dealt = deal(range(10), classes_per_task, seed)
    return pretraining, [Task(labels, train.of_classes(labels), test.of_classes(labels)) for labels in dealt]


class HubImages(Dataset):
    """Rows of a table with an image column; `transform` makes the pixels of one."""

    def __init__(self, table: Any, image: str, label: str, transform: Callable[[Any], torch.Tensor]) -> None:
        self.table, self.image, self.label, self.transform = table, image, label, transform

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.table[int(index)]
        return {"pixel_values": self.transform(row[self.image]), "labels": torch.tensor(row[self.label])}


def hub_tasks(name: str, label: str | None, classes_per_task: int, size: int, seed: int) -> list[Task]:
    """Tasks of a data set with an image column and a class column, such as uoft-cs/cifar100.

    Without a test split a fifth of the rows is the test. As in LAE's code, training images are random crops, maybe
    mirrored, test images the centre; both in [0, 1] without normalising.
    """
    table = load_dataset(name)
    test_split = next((split for split in ("test", "validation") if split in table and "train" in table), None)
    train, test = (table["train"], table[test_split]) if test_split else halves(table, seed)
    features = train.features
    image = next(column for column, kind in features.items() if isinstance(kind, Image))
    classes = [column for column, kind in features.items() if isinstance(kind, ClassLabel)]
    label = label or ("fine_label" if "fine_label" in classes else classes[0])
    where = {split: np.array(part[label]) for split, part in (("train", train), ("test", test))}
    tasks = []
    for labels in deal(range(features[label].num_classes), classes_per_task, seed):
        rows = {split: np.flatnonzero(np.isin(values, labels)) for split, values in where.items()}
        train_images = HubImages(train.select(rows["train"]), image, label, lambda picture: random_crop(picture, size))
        test_images = HubImages(test.select(rows["test"]), image, label, lambda picture: centre_crop(picture, size))
        tasks.append(Task(labels, train_images, test_images))
    return tasks


def halves(table: Any, seed: int) -> tuple[Any, Any]:
    """Four fifths and one fifth of the only split."""
    parts = next(iter(table.values())).train_test_split(test_size=0.2, seed=seed)
    return parts["train"], parts["test"]


def pixels(picture: Any) -> torch.Tensor:
    """(3, height, width) in [0, 1]."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255).movedim(-1, 0).contiguous()


def random_crop(picture: Any, size: int) -> torch.Tensor:
    """8 % to all of the area, with sides of 3:4 to 4:3, scaled to `size`; mirrored or not."""
    width, height = picture.size
    share, ratio = torch.empty(2).uniform_(0, 1).tolist()
    area = width * height * (0.08 + 0.92 * share)
    aspect = float(np.exp(np.log(3 / 4) + ratio * (np.log(4 / 3) - np.log(3 / 4))))
    w, h = min(width, max(1, round((area * aspect) ** 0.5))), min(height, max(1, round((area / aspect) ** 0.5)))
    left, top = int(torch.randint(width - w + 1, ())), int(torch.randint(height - h + 1, ()))
    cropped = pixels(picture.resize((size, size), box=(left, top, left + w, top + h)))
    return cropped.flip(-1) if torch.rand(()) < 0.5 else cropped


def centre_crop(picture: Any, size: int) -> torch.Tensor:
    """The shorter side scaled to 8/7 of `size` (256 for 224), and the middle of that."""
    scale = size * 8 / 7 / min(picture.size)
    width, height = (max(size, round(side * scale)) for side in picture.size)
    left, top = (width - size) // 2, (height - size) // 2
    return pixels(picture.resize((width, height)).crop((left, top, left + size, top + size)))
