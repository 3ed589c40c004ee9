"""StabilizeCallback: Stable-SPAM's clipped and normalised gradients for whatever `optim` the Trainer runs."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_stablespam.optim import stabilize
from hf_stablespam.optim.stabilize.stabilizer import check_stabilize_options
from hf_stablespam.trainer.callbacks.helpers.unwrapping import unwrap
from hf_stablespam.trainer.registration.factory import warn_of_global_clipping
from hf_stablespam.trainer.registration.flat_shards import refuse_flat_shards


class StabilizeCallback(TrainerCallback):
    """Put AdaClip and AdaGN in front of the Trainer's optimizer: `stabilize`, for any `optim`.

    Checkpoints hold the trackers with the optimizer's state, and a resumed run goes on with them. Set
    `max_grad_norm=0`, so that spikes come to AdaClip as they are.

    Args:
        clip_beta: decay rate of the running largest entry (γ3), in [0, 1); `None` for no clipping.
        norm_betas: decay rates of the running norm and squared norm (γ1, γ2); `None` for no normalising.
        eps: ε in the denominator of AdaGN.

    Raises:
        ValueError: an argument out of range; with FSDP1 or DeepSpeed ZeRO, which leave no whole tensors; at the
            start of training an optimizer that is stabilised already.
        TypeError: at the start of training an optimizer that does it by itself (`stable_spam`), or that updates
            inside the backward pass.

    Example:
        >>> from transformers import Trainer
        >>> args = TrainingArguments("out", optim="lion_32bit", max_grad_norm=0)  # doctest: +SKIP
        >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[StabilizeCallback()])  # doctest: +SKIP
    """

    def __init__(
        self,
        clip_beta: float | None = 0.999,
        norm_betas: tuple[float, float] | None = (0.7, 0.9),
        eps: float = 1e-8,
    ) -> None:
        check_stabilize_options(clip_beta, norm_betas, eps)
        if norm_betas is None and eps != 1e-8:
            raise ValueError(
                f"eps={eps!r} needs norm_betas, got None: it is in the denominator of AdaGN alone; set norm_betas, or"
                " leave eps out"
            )
        self.clip_beta, self.norm_betas, self.eps = clip_beta, norm_betas, eps
        self._stabilizer: object | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        refuse_flat_shards(args, "StabilizeCallback")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        refuse_flat_shards(args, "StabilizeCallback")
        optimizer = unwrap(kwargs["optimizer"])
        if self._stabilizer is not None and getattr(optimizer, "stabilizer", None) is self._stabilizer:
            return  # a second train() with the same optimizer: the trackers go on as its moments do
        stabilize(optimizer, clip_beta=self.clip_beta, norm_betas=self.norm_betas, eps=self.eps)
        self._stabilizer = optimizer.stabilizer
        warn_of_global_clipping(args)
