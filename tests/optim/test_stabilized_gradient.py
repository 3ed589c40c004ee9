"""The stabilised gradient on the CPU, made in one pass, against the formulas written out."""

import pytest
import torch

from hf_stablespam.optim.plan import Trackers
from hf_stablespam.optim.single_tensor import stabilized
from hf_stablespam.optim.stabilized_gradient import gradient_statistics, stabilize_gradient
from hf_stablespam.optim.stabilizer import check_stabilize_options

OPTIONS = check_stabilize_options(0.9, (0.7, 0.9), 1e-8)
DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
SHAPES = {"matrix": (300, 70), "number": (), "channels last": (4, 8, 5, 3)}


def spiked(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    grad = torch.randn(shape, dtype=torch.float64) * (1e-30 if kind == "tiny" else 1)
    spikes = {"one spike": 1, "many spikes": 200}.get(kind, 0)
    grad.view(-1)[:spikes] *= 50
    if kind == "nan":
        grad.view(-1)[0] = torch.nan
    grad = grad.to(dtype)
    return grad.to(memory_format=torch.channels_last) if len(shape) == 4 else grad


def trackers(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    precise = torch.promote_types(dtype, torch.float32)
    return {name: torch.zeros((), dtype=precise) for name in Trackers._fields}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", ["calm", "one spike", "many spikes", "tiny", "zeros", "nan"])
def test_the_gradient_is_that_of_the_formulas(kind, shape, dtype):
    torch.manual_seed(0)
    ours, theirs = trackers(dtype), trackers(dtype)
    for step in range(4):
        grad = spiked(kind if step == 3 else "calm", shape, dtype)
        if kind == "zeros":
            grad.zero_()
        before = grad.clone()
        expected, plan, expected_row = stabilized(grad, theirs, OPTIONS)
        for name, value in plan.trackers._asdict().items():
            theirs[name].copy_(value)
        seen = gradient_statistics(grad, ours, OPTIONS)
        found, row = stabilize_gradient(grad, ours, OPTIONS)
        torch.testing.assert_close(seen, row, equal_nan=True, rtol=0, atol=0)
        torch.testing.assert_close(row, expected_row, equal_nan=True, rtol=1e-5, atol=0, check_dtype=False)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
        torch.testing.assert_close(grad, before, equal_nan=True, rtol=0, atol=0)
        if plan.finite:
            assert found.stride() == grad.stride()
            torch.testing.assert_close(found, expected.to(dtype), rtol=DTYPES[dtype], atol=1e-7)
        else:
            assert found is None
    assert bool(row["nonfinite"]) == (kind == "nan")
    if kind in ("one spike", "many spikes") and shape:
        assert row["clipped"] > 0
