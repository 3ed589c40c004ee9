"""FuseChat-3.0 (arXiv 2503.04222): the scored answers of many models train one, by SFT and then by DPO.

`sample_responses` → `score_responses` → `build_preference_dataset` → `train_target`. The losses and the Trainers are
TRL's; what is here are the rules that make two data sets of scored answers, and the way through both stages.
"""

from typing import TYPE_CHECKING

from hf_stablespam._names import lazy_attributes

if TYPE_CHECKING:
    from hf_stablespam.recipes.fusechat.preferences import build_preference_dataset
    from hf_stablespam.recipes.fusechat.report import fusion_report
    from hf_stablespam.recipes.fusechat.sampling import sample_responses
    from hf_stablespam.recipes.fusechat.scoring import score_responses
    from hf_stablespam.recipes.fusechat.settings import paper_settings
    from hf_stablespam.recipes.fusechat.training import train_target

__all__ = [
    "build_preference_dataset",
    "fusion_report",
    "paper_settings",
    "sample_responses",
    "score_responses",
    "train_target",
]

# Lazily: the data sets are made on machines that have no TRL.
__getattr__, __dir__ = lazy_attributes(
    __name__,
    {
        "build_preference_dataset": "hf_stablespam.recipes.fusechat.preferences",
        "fusion_report": "hf_stablespam.recipes.fusechat.report",
        "paper_settings": "hf_stablespam.recipes.fusechat.settings",
        "sample_responses": "hf_stablespam.recipes.fusechat.sampling",
        "score_responses": "hf_stablespam.recipes.fusechat.scoring",
        "train_target": "hf_stablespam.recipes.fusechat.training",
    },
)
