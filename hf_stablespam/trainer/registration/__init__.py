"""`optim="stable_spam"`: the name, its options, and the optimizer that the Trainer builds for it."""

from hf_stablespam.trainer.registration.optimizer_names import register, unregister

__all__ = ["register", "unregister"]
