"""Cross-entropy over the classes of one task only."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional


def local_cross_entropy(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Cross-entropy over the classes whose logits `outputs` has: in training of an `LAEModel` those of the new task.

    The softmax does not see the other classes, so their heads get no gradient. `LAEModel` computes this loss by itself
    when it is given labels; the function is for `Trainer(compute_loss_func=local_cross_entropy)`.

    Args:
        outputs: what `LAEModel` returned; anything with `logits` (batch, classes), as attribute or key, and `classes`,
            the label of each column. Without `classes` the labels are the columns' numbers.
        labels: labels of the data set, (batch,).
        num_items_in_batch: the number of samples of all micro-batches of the step, as the Trainer gives it; the loss is
            then their share of the step's mean.

    Returns:
        A scalar.

    Raises:
        ValueError: a label of none of these classes.

    Example:
        >>> outputs = {"logits": torch.tensor([[2.0, 0.0]]), "classes": torch.tensor([4, 7])}
        >>> round(local_cross_entropy(outputs, torch.tensor([7])).item(), 4)
        2.1269
    """
    logits, classes = _part(outputs, "logits"), _part(outputs, "classes")
    if logits is None:
        raise ValueError(f"outputs must have logits, got {type(outputs).__name__}")
    columns = logits.shape[-1]
    classes = torch.arange(columns) if classes is None else classes[:columns]
    targets = columns_of(labels.to(logits.device), classes.to(logits.device))
    if num_items_in_batch is None:
        return functional.cross_entropy(logits, targets)
    return functional.cross_entropy(logits, targets, reduction="sum") / num_items_in_batch


def columns_of(
    labels: torch.Tensor,  # (batch,)
    classes: torch.Tensor,  # (columns,): the label of each column
) -> torch.Tensor:
    """The column of each label.

    Raises:
        ValueError: a label that is in no column.
    """
    equal = labels.reshape(-1, 1) == classes  # (batch, columns)
    known = equal.any(dim=-1)
    if not known.all():
        unknown = sorted(set(labels.reshape(-1)[~known].tolist()))
        raise ValueError(
            f"labels {unknown} are not among the classes {classes.tolist()} that this loss is over; give each task "
            "only samples of its own classes, or name them: add_task(..., labels=[...])"
        )
    return equal.int().argmax(dim=-1)


def _part(outputs: Any, name: str) -> Any:
    """`outputs.name` or `outputs["name"]`, `None` where there is neither."""
    if isinstance(outputs, dict):
        return outputs.get(name)
    return getattr(outputs, name, None)
