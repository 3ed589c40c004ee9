"""What `StableSPAM` does on the CPU with every part switched off: PyTorch's own AdamW, bit for bit."""

from functools import cache

from torch import Tensor
from torch.optim.adamw import adamw

from hf_stablespam.optim.backends.base import Backend
from hf_stablespam.optim.plan import Options, Plan


def is_plain_adamw(options: Options) -> bool:
    """Whether nothing of Stable-SPAM is left in the options of a parameter group."""
    parts = ("clip_beta", "norm_betas", "reset_interval", "decay_steps", "state_dtype")
    # without ε theirs divides zero by zero where no gradient ever was anything else
    return all(options[part] is None for part in parts) and not options["stochastic_rounding"] and options["eps"] > 0


@cache
def with_adamw(backend: type[Backend]) -> type[Backend]:
    """A backend that measures gradients as another one does, and updates as `torch.optim.AdamW` does."""
    return type(f"AdamW{backend.__name__}", (_AdamWUpdate, backend), {})


class _AdamWUpdate(Backend):
    def update(self, plan: Plan) -> None:
        finite = [index for index, usable in enumerate(plan.finite.tolist()) if usable]
        if not finite:
            return
        batch, options = self.batch.pick(finite), self.options
        named = {name: options[name] for name in ("foreach", "fused", "lr", "weight_decay", "eps", "maximize")}
        named |= {"beta1": options["betas"][0], "beta2": options["betas"][1]}
        if isinstance(options["lr"], Tensor):
            named["foreach"] = None  # its foreach path takes numbers only
        adamw(
            batch.params,
            batch.grads,
            [state["exp_avg"] for state in batch.states],
            [state["exp_avg_sq"] for state in batch.states],
            [],
            [state["moment_step"] - 1 for state in batch.states],  # it counts by itself, and ours has counted already
            **named,
            amsgrad=False,
        )
