"""What `StableSPAM` does with every part switched off: PyTorch's own AdamW, bit for bit."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw


def is_plain_adamw(options: dict[str, Any]) -> bool:
    """Whether nothing of Stable-SPAM is left in the options of a parameter group."""
    parts = ("clip_beta", "norm_betas", "reset_interval", "decay_steps")
    return all(options[part] is None for part in parts)


def plain_adamw_step(
    params: list[Tensor], grads: list[Tensor], states: list[dict[str, Tensor]], options: dict[str, Any]
) -> None:
    """One step of `torch.optim.AdamW` for tensors on the CPU, with its choice of ``foreach`` and ``fused``."""
    if not params:
        return
    torch._foreach_add_([state["step"] for state in states], 1)
    adamw(
        params,
        grads,
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["moment_step"] for state in states],
        foreach=options["foreach"],
        fused=options["fused"],
        amsgrad=False,
        beta1=options["betas"][0],
        beta2=options["betas"][1],
        lr=options["lr"],
        weight_decay=options["weight_decay"],
        eps=options["eps"],
        maximize=options["maximize"],
    )
