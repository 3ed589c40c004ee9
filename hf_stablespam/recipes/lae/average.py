"""The offline expert: an exponential moving average of the online one."""

from __future__ import annotations

from collections.abc import Sequence

import torch


@torch.no_grad()
def update_average(offline: Sequence[torch.Tensor], online: Sequence[torch.Tensor], decay: float) -> torch.Tensor:
    r"""$\theta_\mathrm{off} \leftarrow \alpha\,\theta_\mathrm{off} + (1 - \alpha)\,\theta_\mathrm{on}$, in place.

    Computed in the dtype of `offline`. When a number of `online` is not finite, no tensor of `offline` changes.

    Args:
        offline: the averages.
        online: tensors of the same shapes.
        decay: $\alpha$.

    Returns:
        Whether all of `online` was finite: a tensor without dimension, on the device of the first one.

    Example:
        >>> offline = [torch.tensor([1.0])]
        >>> update_average(offline, [torch.tensor([2.0])], 0.75), offline
        (tensor(True), [tensor([1.2500])])
    """
    finite = torch.stack([tensor.isfinite().all().to(online[0].device) for tensor in online]).all()
    targets = [source.to(average.dtype) for source, average in zip(online, offline, strict=True)]
    updated = torch._foreach_lerp(list(offline), targets, 1 - decay)
    for average, new in zip(offline, updated, strict=True):
        average.copy_(torch.where(finite.to(average.device), new, average))
    return finite
