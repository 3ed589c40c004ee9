"""Optimizers: torch only."""

from hf_stablespam.optim.stable_spam import StableSPAM

__all__ = ["StableSPAM"]
