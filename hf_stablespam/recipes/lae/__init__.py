"""LAE: class-incremental learning with any PEFT method (arXiv 2303.10070).

Two adapters in one `PeftModel`: "default" learns each new task, "offline" is its moving average; a classifier grows by
a head for each task, and the larger of the two probabilities decides. Importing this module makes PEFT know
`ParallelAdapterConfig` and `CalibratedPrefixConfig`.
"""

from hf_stablespam.recipes.lae.adapters import add_lae_adapters
from hf_stablespam.recipes.lae.callback import LAECallback
from hf_stablespam.recipes.lae.classifier import IncrementalClassifier
from hf_stablespam.recipes.lae.loss import local_cross_entropy
from hf_stablespam.recipes.lae.methods.config import CalibratedPrefixConfig, ParallelAdapterConfig
from hf_stablespam.recipes.lae.metrics import IncrementalMetrics, accuracy_per_task, incremental_metrics
from hf_stablespam.recipes.lae.model import LAEModel, LAEOutput
from hf_stablespam.recipes.lae.prediction import ensemble_probabilities, expert_logits, lae_predict, score_dataset

__all__ = [
    "CalibratedPrefixConfig",
    "IncrementalClassifier",
    "IncrementalMetrics",
    "LAECallback",
    "LAEModel",
    "LAEOutput",
    "ParallelAdapterConfig",
    "accuracy_per_task",
    "add_lae_adapters",
    "ensemble_probabilities",
    "expert_logits",
    "incremental_metrics",
    "lae_predict",
    "local_cross_entropy",
    "score_dataset",
]
