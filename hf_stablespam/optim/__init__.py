"""Optimizers: torch only."""

from hf_stablespam.optim.layerwise import LayerwiseStableSPAM
from hf_stablespam.optim.spam import SPAM
from hf_stablespam.optim.stabilize import stabilize
from hf_stablespam.optim.stable_spam import StableSPAM

__all__ = ["SPAM", "LayerwiseStableSPAM", "StableSPAM", "stabilize"]
