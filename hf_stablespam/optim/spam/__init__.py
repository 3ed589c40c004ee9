"""SPAM, which Stable-SPAM came from."""

from hf_stablespam.optim.spam.optimizer import SPAM

__all__ = ["SPAM"]
