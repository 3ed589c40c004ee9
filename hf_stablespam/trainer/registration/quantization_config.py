"""`quantization_config=FourBitConfig(…)` in every `from_pretrained`, by way of transformers' public registration.

transformers asks a configuration for its `quant_method`, finds the quantizer that is registered for it, and writes the
configuration with the model; a process that knows no such method reads it in the folder's ``config.json`` and says its
name. That name is therefore the package's.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hf_stablespam.trainer.registration.after_import import after_import

if TYPE_CHECKING:
    from transformers.quantizers.base import HfQuantizer

QUANT_METHOD = "hf_stablespam"


def teach_quantizers(auto: ModuleType) -> None:
    """Register configuration and quantizer with ``transformers.quantizers.auto``. Twice is harmless."""
    if QUANT_METHOD in auto.AUTO_QUANTIZER_MAPPING:
        return
    auto.register_quantization_config(QUANT_METHOD)(_config_class())
    auto.register_quantizer(QUANT_METHOD)(_quantizer_class())


def forget_quantizers() -> None:
    """Undo `teach_quantizers`."""
    auto = sys.modules.get("transformers.quantizers.auto")
    if auto is not None:
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING.pop(QUANT_METHOD, None)
        auto.AUTO_QUANTIZER_MAPPING.pop(QUANT_METHOD, None)


def _config_class() -> Any:
    """`FourBitConfig` as transformers wants it: of its own base class, with the method in its dictionary."""
    from transformers.utils.quantization_config import QuantizationConfigMixin

    from hf_stablespam.quant import config as own

    # transformers compares the names of the classes of a folder's configuration and of the one that was given.
    class FourBitConfig(own.FourBitConfig, QuantizationConfigMixin):  # type: ignore[misc]
        __doc__ = own.FourBitConfig.__doc__

        def to_dict(self) -> dict[str, Any]:
            return {"quant_method": QUANT_METHOD, **own.FourBitConfig.to_dict(self)}

        @classmethod
        def from_dict(  # type: ignore[override]
            cls, options: Any, return_unused_kwargs: bool = False, **others: Any
        ) -> Any:
            fields = {name: value for name, value in options.items() if name != "quant_method"}
            config = super().from_dict({**fields, **others})
            return (config, {}) if return_unused_kwargs else config

        def __eq__(self, other: object) -> bool:
            if not isinstance(other, own.FourBitConfig):
                return False
            return own.FourBitConfig.to_dict(self) == own.FourBitConfig.to_dict(other)

        __hash__ = own.FourBitConfig.__hash__

        def __reduce__(self) -> tuple[Any, ...]:  # the class itself has no importable name
            return _from_dict, (self.to_dict(),)

    return FourBitConfig


def _from_dict(options: dict[str, Any]) -> Any:
    """The configuration again, in a process that unpickles it."""
    from transformers.quantizers.auto import AutoQuantizationConfig

    return AutoQuantizationConfig.from_dict(options)


def _patch_trainer(trainer: Any) -> None:
    """What `FourBitCallback` does to the Trainer, for models that came in 4 bits."""
    from hf_stablespam.trainer.reference_model import convert_references

    convert_references()


def _quantizer_class() -> type[HfQuantizer]:
    from transformers.quantizers.base import HfQuantizer

    class FourBitQuantizer(HfQuantizer):
        """Converts a model when its weights are loaded; after that it is an ordinary model with 4-bit layers."""

        requires_calibration = False
        required_packages: tuple[str, ...] = ()

        def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
            from transformers.quantizers.auto import AutoQuantizationConfig

            from hf_stablespam.quant import FourBitConfig

            options = {name: value for name, value in quantization_config.to_dict().items() if name != "quant_method"}
            self.config = FourBitConfig.from_dict(options)
            super().__init__(AutoQuantizationConfig.from_dict({"quant_method": QUANT_METHOD, **options}), **kwargs)

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            return model

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            from hf_stablespam.quant import convert_to_4bit

            convert_to_4bit(model, self.config)
            after_import("transformers.trainer", _patch_trainer)
            model.config.quantization_config = self.quantization_config
            # Nothing of the weights is quantized: whatever treats a quantized model in a special way (saving without
            # the state dict that it was given, refusing to train) must not see one.
            model.__dict__.pop("hf_quantizer", None)
            model.__dict__.pop("quantization_method", None)
            model.config.__dict__.pop("_pre_quantization_dtype", None)  # of transformers 4, which JSON does not know
            model.is_quantized = False
            return model

        def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return True

        @property
        def is_qat_trainable(self) -> bool:
            return True

        @property
        def is_compileable(self) -> bool:
            return True

    return FourBitQuantizer
