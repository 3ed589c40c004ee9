"""Train in 4 bits: a callback that converts the Trainer's model."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_stablespam.quant import FourBitConfig, convert_to_4bit


class FourBitCallback(TrainerCallback):
    """Converts the model's linear layers to 4 bits before the optimizer is made.

    With `model_init` the Trainer builds the model anew when training begins, and it is converted again then. Converting
    a converted model does nothing.

    Args:
        config: formats and which layers; default `FourBitConfig()`.

    Raises:
        ValueError: from `convert_to_4bit`, for example when the model has no linear layer.

    Example:
        >>> callback = FourBitCallback(FourBitConfig(weight="int4", activation=None))
        >>> callback.config.weight
        'int4'
    """

    def __init__(self, config: FourBitConfig | None = None) -> None:
        if config is not None and not isinstance(config, FourBitConfig):
            raise TypeError(f"config must be a FourBitConfig, got {type(config).__name__}; use FourBitConfig(...)")
        self.config = config or FourBitConfig()

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **others: Any
    ) -> None:
        if model is not None:
            convert_to_4bit(model, self.config)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **others: Any
    ) -> None:
        convert_to_4bit(model, self.config)
