"""The Trainer's side: `optim="stable_spam"` and the callbacks. The only folder that imports transformers."""

from typing import TYPE_CHECKING

from hf_stablespam._names import lazy_attributes
from hf_stablespam.trainer.registration import register, unregister

if TYPE_CHECKING:
    from hf_stablespam.trainer.callbacks.four_bit import FourBitCallback
    from hf_stablespam.trainer.callbacks.gradient_norm import GradientNormCallback
    from hf_stablespam.trainer.callbacks.learning_rate_scale import LearningRateScaleCallback
    from hf_stablespam.trainer.callbacks.momentum_reset import MomentumResetCallback
    from hf_stablespam.trainer.callbacks.spike_recorder import SpikeRecorder, SpikeRecorderCallback
    from hf_stablespam.trainer.callbacks.stabilize import StabilizeCallback
    from hf_stablespam.trainer.checkpoints import last_complete_checkpoint

__all__ = [
    "FourBitCallback",
    "GradientNormCallback",
    "LearningRateScaleCallback",
    "MomentumResetCallback",
    "SpikeRecorder",
    "SpikeRecorderCallback",
    "StabilizeCallback",
    "last_complete_checkpoint",
    "register",
    "unregister",
]

# Lazily, because registering must not import transformers: a script under the launcher may never need it.
__getattr__, __dir__ = lazy_attributes(
    __name__,
    {
        "FourBitCallback": "hf_stablespam.trainer.callbacks.four_bit",
        "GradientNormCallback": "hf_stablespam.trainer.callbacks.gradient_norm",
        "LearningRateScaleCallback": "hf_stablespam.trainer.callbacks.learning_rate_scale",
        "MomentumResetCallback": "hf_stablespam.trainer.callbacks.momentum_reset",
        "SpikeRecorder": "hf_stablespam.trainer.callbacks.spike_recorder",
        "SpikeRecorderCallback": "hf_stablespam.trainer.callbacks.spike_recorder",
        "last_complete_checkpoint": "hf_stablespam.trainer.checkpoints",
        "StabilizeCallback": "hf_stablespam.trainer.callbacks.stabilize",
    },
)
