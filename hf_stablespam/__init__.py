"""Train any Hugging Face model stably in 4 bits: Stable-SPAM and 4-bit linear layers for the Trainer.

Importing this package makes `optim="stable_spam"` known to `transformers.TrainingArguments`. It imports neither
torch nor transformers by itself: the public names below are loaded when they are first used.
"""

from typing import TYPE_CHECKING

from hf_stablespam._names import lazy_attributes
from hf_stablespam.trainer.registration import register, unregister

if TYPE_CHECKING:
    from hf_stablespam.optim import SPAM, StableSPAM, stabilize
    from hf_stablespam.quant import (
        FourBitConfig,
        FourBitLinear,
        convert_from_4bit,
        convert_to_4bit,
        export_4bit,
        export_gguf,
        fixed_weights,
        repack_gguf,
        restore_linear,
    )
    from hf_stablespam.trainer import (
        FourBitCallback,
        GradientNormCallback,
        LearningRateScaleCallback,
        MomentumResetCallback,
        SpikeRecorder,
        SpikeRecorderCallback,
        StabilizeCallback,
        last_complete_checkpoint,
    )

__version__ = "0.1.0"

__all__ = [
    "SPAM",
    "FourBitCallback",
    "FourBitConfig",
    "FourBitLinear",
    "GradientNormCallback",
    "LearningRateScaleCallback",
    "MomentumResetCallback",
    "SpikeRecorder",
    "SpikeRecorderCallback",
    "StabilizeCallback",
    "StableSPAM",
    "convert_from_4bit",
    "convert_to_4bit",
    "export_4bit",
    "export_gguf",
    "fixed_weights",
    "last_complete_checkpoint",
    "register",
    "repack_gguf",
    "restore_linear",
    "stabilize",
    "unregister",
]

__getattr__, __dir__ = lazy_attributes(
    __name__,
    {
        "FourBitCallback": "hf_stablespam.trainer",
        "FourBitConfig": "hf_stablespam.quant",
        "FourBitLinear": "hf_stablespam.quant",
        "GradientNormCallback": "hf_stablespam.trainer",
        "LearningRateScaleCallback": "hf_stablespam.trainer",
        "MomentumResetCallback": "hf_stablespam.trainer",
        "SPAM": "hf_stablespam.optim",
        "SpikeRecorder": "hf_stablespam.trainer",
        "SpikeRecorderCallback": "hf_stablespam.trainer",
        "StabilizeCallback": "hf_stablespam.trainer",
        "StableSPAM": "hf_stablespam.optim",
        "convert_from_4bit": "hf_stablespam.quant",
        "convert_to_4bit": "hf_stablespam.quant",
        "export_4bit": "hf_stablespam.quant",
        "export_gguf": "hf_stablespam.quant",
        "fixed_weights": "hf_stablespam.quant",
        "last_complete_checkpoint": "hf_stablespam.trainer",
        "repack_gguf": "hf_stablespam.quant",
        "restore_linear": "hf_stablespam.quant",
        "stabilize": "hf_stablespam.optim",
    },
)

register()
