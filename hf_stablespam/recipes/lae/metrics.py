"""How well a model tells all classes apart after a sequence of tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class IncrementalMetrics(NamedTuple):
    """Three figures of a sequence of tasks, each in the unit of the accuracies that they come from."""

    last: float
    average: float
    forgetting: float


def incremental_metrics(
    accuracy_matrix: Sequence[Sequence[float]], samples_per_task: Sequence[int] | None = None
) -> IncrementalMetrics:
    r"""Last-incremental accuracy, its average over the tasks, and forgetting.

    With $a_{ij}$ the accuracy on the samples of task $j$ after task $i$, among all classes seen by then,

    $$A_i = \frac{\sum_{j \le i} n_j a_{ij}}{\sum_{j \le i} n_j}, \qquad \mathrm{last} = A_T, \qquad
    \mathrm{average} = \frac1T \sum_i A_i, \qquad
    \mathrm{forgetting} = \frac1T \sum_j \bigl( \max_{i \ge j} a_{ij} - a_{Tj} \bigr).$$

    Some papers divide the forgetting by $T - 1$, because the last task's term is 0.

    Args:
        accuracy_matrix: row i holds the accuracies after task i on tasks 0 … i; what stands behind them is ignored.
        samples_per_task: $n_j$, the number of test samples of each task; default: equally many.

    Raises:
        ValueError: no tasks, a row that is too short, or as many sample counts as there are not tasks.

    Example:
        >>> metrics = incremental_metrics([[1.0], [0.5, 1.0]])
        >>> metrics.last, metrics.average, metrics.forgetting
        (0.75, 0.875, 0.25)
    """
    tasks = len(accuracy_matrix)
    if not tasks:
        raise ValueError("accuracy_matrix has no rows; give one row for each task")
    for task, row in enumerate(accuracy_matrix):
        if len(row) <= task:
            raise ValueError(f"accuracy_matrix: row {task} needs {task + 1} accuracies, got {len(row)}")
    counts = [1] * tasks if samples_per_task is None else [int(count) for count in samples_per_task]
    if len(counts) != tasks or min(counts) < 1:
        raise ValueError(f"samples_per_task must be {tasks} positive numbers, got {samples_per_task}")
    rows = [[float(value) for value in row] for row in accuracy_matrix]
    accuracies = [
        sum(count * value for count, value in zip(counts[: task + 1], rows[task], strict=False))
        / sum(counts[: task + 1])
        for task in range(tasks)
    ]
    forgotten = [max(rows[after][task] for after in range(task, tasks)) - rows[-1][task] for task in range(tasks)]
    return IncrementalMetrics(accuracies[-1], sum(accuracies) / tasks, sum(forgotten) / tasks)


def accuracy_per_task(
    scores: torch.Tensor,  # (samples, classes): probabilities or logits
    columns: torch.Tensor,  # (samples,): the right column of each
    classes_per_task: Sequence[int],
    *,
    among_own_classes: bool = False,
) -> list[float]:
    """The share of right answers on the samples of each task; `nan` for a task without samples.

    Args:
        scores: one row per sample, one column per class seen.
        columns: the right column of each sample.
        classes_per_task: how many columns belong to each task.
        among_own_classes: as if each sample's task were known: only the classes of its task compete.

    Example:
        >>> scores = torch.tensor([[0.1, 0.2, 0.9], [0.1, 0.2, 0.9]])
        >>> accuracy_per_task(scores, torch.tensor([1, 2]), [2, 1])
        [0.0, 1.0]
        >>> accuracy_per_task(scores, torch.tensor([1, 2]), [2, 1], among_own_classes=True)
        [1.0, 1.0]
    """
    task_of_column = torch.arange(len(classes_per_task)).repeat_interleave(torch.tensor(classes_per_task))
    scores, columns = scores.cpu(), columns.cpu()
    tasks = task_of_column[columns]
    if among_own_classes:
        scores = scores.masked_fill(task_of_column != tasks[:, None], -torch.inf)
    right = scores.argmax(dim=-1) == columns
    return [right[tasks == task].double().mean().item() for task in range(len(classes_per_task))]
