"""What `StableSPAM` does with every part switched off: PyTorch's own AdamW, bit for bit."""

import torch
from torch.optim.adamw import adamw

from hf_stablespam.optim.plan import Batch, Options, State


def is_plain_adamw(options: Options) -> bool:
    """Whether nothing of Stable-SPAM is left in the options of a parameter group."""
    if options["clip_beta"] is not None or options["norm_betas"] is not None or options["reset_interval"] is not None:
        return False
    return options["decay_steps"] is None and options["state_dtype"] is None and not options["stochastic_rounding"]


def unscale(state: State) -> None:
    """Moments that an earlier step left scaled (see `cpu_direct`), multiplied out: AdamW knows no scales."""
    for name in ("exp_avg", "exp_avg_sq"):
        scale = state[f"{name}_scale"]
        if scale != 1:
            state[name].mul_(scale)
            scale.fill_(1)


def plain_adamw_step(batch: Batch, options: Options) -> None:
    """One step of `torch.optim.AdamW` for tensors on the CPU, with its choice of ``foreach`` and ``fused``."""
    torch._foreach_add_([state["step"] for state in batch.states], 1)
    adamw(
        batch.params,
        batch.grads,
        [state["exp_avg"] for state in batch.states],
        [state["exp_avg_sq"] for state in batch.states],
        [],
        [state["moment_step"] for state in batch.states],
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
