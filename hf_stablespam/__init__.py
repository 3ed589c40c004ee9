"""Train any Hugging Face model stably in 4 bits: Stable-SPAM and 4-bit linear layers for the Trainer."""

__version__ = "0.1.0"
