"""AdaClip and AdaGN in front of any torch optimizer."""

from hf_stablespam.optim.stabilize.stabilizer import stabilize

__all__ = ["stabilize"]
