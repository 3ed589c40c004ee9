"""The frozen reference of preference training (TRL's DPO, KTO, GRPO, …) computes in 4 bits if the policy does.

The policy's loss compares the two: with a reference in high precision it would push the policy to undo the rounding.
TRL makes the reference after the Trainer, so it is converted when training, evaluating or predicting begins.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from transformers import Trainer

from hf_stablespam.quant import convert_to_4bit
from hf_stablespam.quant.convert import configuration_of
from hf_stablespam.trainer.patching import patch

logger = logging.getLogger(__name__)


def convert_references() -> None:
    """From now on a Trainer with a 4-bit model and a `ref_model` converts the latter as the model is."""
    for method in ("train", "evaluate", "predict"):
        patch(Trainer, method, _after_converting)


def _after_converting(method: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        convert_reference(self)
        return method(self, *args, **kwargs)

    return wrapped


def convert_reference(trainer: Any) -> None:
    """Convert a Trainer's `ref_model` as its model is, if it has one that is not.

    Raises:
        ValueError: its log-probabilities have been computed already, in high precision.
    """
    reference = getattr(trainer, "ref_model", None)
    # With `model_init` there is no model before the training.
    config = None if trainer.model is None else configuration_of(trainer.model)
    if reference is None or config is None or configuration_of(reference) is not None:
        return
    if getattr(trainer, "precompute_ref_logps", False) or getattr(trainer.args, "precompute_ref_log_probs", False):
        raise ValueError(
            "ref_model must be in 4 bits as the model is, but its log-probabilities were computed in high precision"
            " when the trainer was made (precompute_ref_log_probs=True); pass ref_model=convert_to_4bit(ref_model,"
            " config), or set precompute_ref_log_probs=False"
        )
    logger.info("the reference model is converted as the model is")
    convert_to_4bit(trainer.accelerator.unwrap_model(reference), config)
