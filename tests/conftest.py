"""Settings that all tests share: no network, no reporting integrations, the same seed for each test."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
import torch

if not torch.cuda.is_available():
    # Read when triton is imported, which torchao does too, and transformers through it: so before any test module.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
