"""The source's settings of both stages, as TRL's configurations."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging

if TYPE_CHECKING:
    from trl import DPOConfig, SFTConfig

logger = logging.get_logger(__name__)

NEEDED = "training a target needs TRL 1.14 or newer; pip install 'hf_stablespam[fusechat]'"


@dataclass(frozen=True)
class Target:
    """What the source found for one family of target models."""

    sft_learning_rate: float
    dpo_learning_rate: float
    beta: float
    loss_type: str  # TRL's name: "sigmoid_norm" is length-normalised


TARGETS = {
    "Llama-3.1-8B": Target(5e-6, 8e-7, 10.0, "sigmoid_norm"),
    "Llama-3.2-3B": Target(5e-6, 1e-6, 10.0, "sigmoid_norm"),
    "Llama-3.2-1B": Target(5e-6, 1e-6, 10.0, "sigmoid_norm"),
    "Qwen-2.5-7B": Target(2e-6, 3e-7, 0.01, "sigmoid"),
    "Gemma-2-9B": Target(2e-6, 5e-7, 0.01, "sigmoid"),
}
BATCH = 128  # sequences of a step, on all processes together


def paper_settings(
    output_dir: str | os.PathLike[str],
    target: str = "Llama-3.1-8B",
    *,
    sft: Mapping[str, Any] | None = None,
    dpo: Mapping[str, Any] | None = None,
) -> tuple[SFTConfig, DPOConfig]:
    """Both stages as FuseChat-3.0 trains them, with Stable-SPAM.

    SFT: 3 epochs, batch 128 (sequences a device takes times processes must divide it, else the batch is the nearest
    below, with a warning), 2048 tokens, cosine, warm-up over a tenth. DPO: 1 epoch, the same batch and length, a
    checkpoint every 100 steps, the last two kept. Learning rates, β and loss by target:

    | target | SFT | DPO | β | loss |
    |---|---|---|---|---|
    | Llama-3.1-8B | 5e-6 | 8e-7 | 10 | length-normalised |
    | Llama-3.2-3B, Llama-3.2-1B | 5e-6 | 1e-6 | 10 | length-normalised |
    | Qwen-2.5-7B | 2e-6 | 3e-7 | 0.01 | plain |
    | Gemma-2-9B | 2e-6 | 5e-7 | 0.01 | plain |

    ``optim="stable_spam"`` and ``max_grad_norm=0`` are ours. At such learning rates bfloat16 weights do not move: keep
    them in float32, or add ``optim_args="stochastic_rounding=True"``.

    Args:
        output_dir: the stages write into its folders ``sft`` and ``dpo``.
        target: a name of the table.
        sft: fields of `trl.SFTConfig` that are to be otherwise.
        dpo: fields of `trl.DPOConfig` that are to be otherwise.

    Returns:
        The configurations of both stages.

    Raises:
        ValueError: an unknown target.
        TypeError: a field that the configuration does not have.
        ImportError: TRL is not installed.

    Example:
        >>> sft_args, dpo_args = paper_settings("fused", "Llama-3.2-1B", dpo={"bf16": False})
        >>> sft_args.learning_rate, dpo_args.beta, dpo_args.loss_type
        (5e-06, 10.0, ['sigmoid_norm'])
    """
    try:
        from trl import DPOConfig, SFTConfig
    except ImportError as error:
        raise ImportError(NEEDED) from error
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target!r}; others start from the nearest")
    chosen = TARGETS[target]
    first: dict[str, Any] = {"learning_rate": chosen.sft_learning_rate, "num_train_epochs": 3}
    second: dict[str, Any] = {"learning_rate": chosen.dpo_learning_rate, "num_train_epochs": 1}
    second |= {"beta": chosen.beta, "loss_type": [chosen.loss_type]}
    second |= {"save_strategy": "steps", "save_steps": 100, "save_total_limit": 2}
    sft, dpo = sft or {}, dpo or {}
    return (
        SFTConfig(**{**_common(Path(output_dir, "sft"), SFTConfig, sft), **first, **sft}),
        DPOConfig(**{**_common(Path(output_dir, "dpo"), DPOConfig, dpo), **second, **dpo}),
    )


def _common(folder: Path, kind: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    """What the stages share; the accumulation makes up the batch, whatever fits a device at a time."""
    at_a_time = changes.get("per_device_train_batch_size", 8)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    steps = max(1, BATCH // (at_a_time * processes))
    if at_a_time * processes * steps != BATCH and "gradient_accumulation_steps" not in changes:
        logger.warning(
            "%d sequences on each of %d processes do not make up the batch of %d: it is %d; give a"
            " per_device_train_batch_size that divides %d",
            *(at_a_time, processes, BATCH, at_a_time * processes * steps, BATCH // processes or 1),
        )
    has_ratio = any(field.name == "warmup_ratio" for field in fields(kind))  # until transformers 5
    return {
        "output_dir": str(folder),
        "optim": "stable_spam",
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": at_a_time,
        "gradient_accumulation_steps": steps,
        "max_length": 2048,
        "lr_scheduler_type": "cosine",
        "warmup_ratio" if has_ratio else "warmup_steps": 0.1,
        "bf16": torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        "report_to": [],
    }
