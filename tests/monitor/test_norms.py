"""Norms and largest entries of many tensors, of every dtype; sharded ones are tested with the Trainer's FSDP2."""

import pytest
import torch

from hf_stablespam.monitor.norms import Shards


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_norms_and_largest_entries(dtype):
    tensors = [torch.randn(5, 3, dtype=dtype) * 1000, torch.randn(7, dtype=dtype), torch.zeros(0, dtype=dtype)]
    shards = Shards(tensors)
    norms = shards.norms(tensors, [tensor * 2 for tensor in tensors])
    expected = torch.stack([tensor.double().norm().float() for tensor in tensors])
    torch.testing.assert_close(
        norms, torch.stack([expected, 2 * expected]), rtol=1e-3 if dtype.itemsize == 2 else 1e-5, atol=0
    )
    largest = [tensor.abs().max().item() if tensor.numel() else 0.0 for tensor in tensors]
    assert shards.largest(tensors).tolist() == pytest.approx(largest)


def test_sums_of_squares_of_half_precision_do_not_overflow():
    tensor = torch.full((100,), 60000.0, dtype=torch.float16)
    assert Shards([tensor]).norms([tensor]).item() == pytest.approx(600000.0, rel=1e-3)


def test_nonfinite_entries_show_in_the_norm():
    tensors = [torch.tensor([1.0, value]) for value in (float("nan"), float("inf"), 2.0)]
    assert Shards(tensors).norms(tensors)[0].isfinite().tolist() == [False, False, True]
