"""LearningRateScaleCallback: learning rates of their own for embeddings, head and norms, with whatever `optim`."""

import logging
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_stablespam.trainer.callbacks.helpers.unwrapping import unwrap
from hf_stablespam.trainer.registration.flat_shards import refuse_flat_shards
from hf_stablespam.trainer.registration.options.lr_scales import check_scale, check_scaled, differing

logger = logging.getLogger(__name__)


class LearningRateScaleCallback(TrainerCallback):
    """Train embeddings, the output head or norms with a multiple of the learning rate, for any `optim`.

    The Trainer's optimizer, built by it or passed to it, gets parameter groups for them, each with the options, such as
    the weight decay, of the group from which it was taken; the schedule runs for all of them, and the learning rate in
    the logs stays that of `learning_rate`. With `optim="stable_spam"` or `"spam"` the same can be written as
    `optim_args="embedding_lr_scale=10"`. A head that is tied to the embedding is an embedding.

    Args:
        embedding: factor on the learning rate of every `nn.Embedding`; `None` leaves them where they are.
        head: the same for the model's output embedding.
        norm: the same for weights and biases of normalising layers.

    Raises:
        ValueError: a factor that is no number above 0, or none at all; before training a kind of which nothing is
            trained, an optimizer that comes with a schedule, a Trainer whose own `create_optimizer` does not call the
            Trainer's, FSDP1 or DeepSpeed ZeRO.

    Example:
        >>> callback = LearningRateScaleCallback(embedding=10.0)
        >>> callback.scales
        {'embedding': 10.0}
    """

    def __init__(self, embedding: float | None = None, head: float | None = None, norm: float | None = None) -> None:
        given = {"embedding": embedding, "head": head, "norm": norm}
        self.scales = {kind: scale for kind, scale in given.items() if scale is not None}
        for kind, scale in self.scales.items():
            check_scale(kind, scale)
        if not self.scales:
            raise ValueError("LearningRateScaleCallback changes no learning rate; set embedding, head or norm")

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        refuse_flat_shards(args, "LearningRateScaleCallback")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer = unwrap(kwargs["optimizer"])
        check_scaled(optimizer, self.scales)
        lost = differing(optimizer, self.scales)
        if lost:
            logger.warning(
                "the learning rates of the checkpoint hold, not those of this run: lr_scale of %s counts for nothing; "
                "to train with it, begin a new run from the checkpoint's weights",
                ", ".join(f"{scale:g}" for scale in sorted(lost)),
            )
