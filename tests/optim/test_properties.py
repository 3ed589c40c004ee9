"""Whatever comes, in whatever order: no `nan` in weights or state, no gradient changed, and all paths agree."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_stablespam.optim import StableSPAM
from tests.optim.common import PATHS

SHAPES = [(), (0,), (1,), (7,), (3, 0), (5, 6), (33, 40), (2, 3, 4, 5)]
EVENTS = ["normal", "normal", "spike", "zero", "nan", "inf", "none", "denormal", "large", "too large"]
LAYOUTS = ["contiguous", "transposed", "channels last", "strided"]

options_strategy = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([0.0, 1e-4, 1e-2]),
        # not β2 = 0: with ε = 0 a gradient of zero after another one is then divided by zero
        "betas": st.sampled_from([(0.9, 0.999), (0.0, 0.9), (0.5, 0.5)]),
        "eps": st.sampled_from([0.0, 1e-8, 1e-6]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "clip_beta": st.sampled_from([None, 0.0, 0.9, 0.999]),
        "norm_betas": st.sampled_from([None, (0.7, 0.9), (0.0, 0.0), (0.85, 0.99999)]),
        "reset_interval": st.sampled_from([None, 1, 3]),
        "decay_steps": st.sampled_from([None, 1, 4]),
        "decay_floor": st.sampled_from([0.0, 0.5, 1.0]),
        "maximize": st.booleans(),
        "state_dtype": st.sampled_from([None, torch.float32]),
    }
)
tensor_strategy = st.tuples(st.sampled_from(SHAPES), st.sampled_from(LAYOUTS))
steps_strategy = st.lists(st.lists(st.sampled_from(EVENTS), min_size=3, max_size=3), min_size=1, max_size=8)


def laid_out(value, layout):
    """The same values in another order of memory."""
    if layout == "transposed" and value.dim() >= 2:
        return value.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "channels last" and value.dim() == 4:
        return value.contiguous(memory_format=torch.channels_last)
    if layout == "strided" and value.dim() >= 1:
        return torch.stack([value, value], dim=-1)[..., 0]
    return value


def gradient(event, shape, dtype, generator):
    if event == "none":
        return None
    grad = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.01
    scale = {"zero": 0, "denormal": 1e-40, "large": 1e15, "too large": 1e38}.get(event, 1)
    grad = (grad * scale).to(dtype)
    if grad.numel() and event in ("nan", "inf"):
        grad.view(-1)[0] = math.nan if event == "nan" else math.inf
    if grad.numel() and event == "spike":
        grad.view(-1)[0] *= 1000
    return grad


def run(tensors, steps, dtype, options, path, late):
    generator = torch.Generator().manual_seed(0)
    params = [
        torch.nn.Parameter(laid_out(torch.randn(shape, generator=generator).to(dtype), layout))
        for shape, layout in tensors
    ]
    optimizer = StableSPAM(params[: 2 if late else 3], **options, **path)
    for number, events in enumerate(steps):
        if late and number == len(steps) // 2:
            optimizer.add_param_group({"params": params[2:], "lr": 1e-3})
        grads = [gradient(event, p.shape, dtype, generator) for event, p in zip(events, params, strict=True)]
        for param, grad, (_, layout) in zip(params, grads, tensors, strict=True):
            param.grad = None if grad is None else laid_out(grad.clone(), layout)
        optimizer.step()
        for param, grad in zip(params, grads, strict=True):
            assert grad is None or torch.equal(param.grad.nan_to_num(7.0), grad.nan_to_num(7.0))
    for param in params:
        assert param.isfinite().all()
        for name, value in optimizer.state[param].items() if param in optimizer.state else ():
            assert value.isfinite().all(), name
    if dtype != torch.float64:  # its factors may leave the range of the statistics, which are float32
        assert all(value.isfinite().all() for name, value in optimizer.statistics.items() if name == "norm_factor")
    return params, optimizer


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    tensors=st.lists(tensor_strategy, min_size=3, max_size=3),
    steps=steps_strategy,
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    options=options_strategy,
    late=st.booleans(),
)
def test_never_a_nan_and_all_paths_agree(tensors, steps, dtype, options, late):
    results = {name: run(tensors, steps, dtype, options, path, late) for name, path in PATHS.items()}
    expected, by_loop = results["loop"]
    step_size = max(options["lr"], 1e-3 if late else 0) * len(steps)
    bound = {torch.float64: 1e-9, torch.float32: 1e-3 * step_size + 1e-6}.get(dtype, 0.04 + step_size)
    for params, optimizer in results.values():
        for one, other in zip(params, expected, strict=True):
            torch.testing.assert_close(one.detach(), other.detach(), rtol=1e-5, atol=bound)
            if other in by_loop.state and "step" in by_loop.state[other]:
                for counter in ("step", "moment_step"):
                    assert optimizer.state[one][counter] == by_loop.state[other][counter]
