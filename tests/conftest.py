"""Settings that all tests share: no network, no reporting integrations, the same seed for each test."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
import torch

gc.disable()  # while libraries are imported, of which nothing is garbage

if not torch.cuda.is_available():
    # Read when triton is imported, which torchao does too, and transformers through it: so before any test module.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items):
    """Modules with slow tests come first, so that no worker is alone with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish():
    gc.enable()
    gc.set_threshold(50_000)


@pytest.fixture(autouse=True, scope="module")
def _what_is_imported_is_no_garbage():
    """Every run of the Trainer collects garbage, and would search the millions of objects of libraries each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


PRECISION = "ACCELERATE_MIXED_PRECISION"
_precision_at_start = os.environ.get(PRECISION)


@pytest.fixture(autouse=True)
def _no_precision_of_an_earlier_run():
    """transformers 4.57 leaves a run's mixed precision in the environment, where the next run finds it."""
    yield
    os.environ.pop(PRECISION, None)
    if _precision_at_start is not None:
        os.environ[PRECISION] = _precision_at_start
