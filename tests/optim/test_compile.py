"""`torch.compile` takes the step whole, and the compiled step does what the plain one does."""

import shutil

import pytest
import torch

from hf_stablespam.optim import StableSPAM
from hf_stablespam.optim.plan import Batch
from hf_stablespam.optim.state.fresh import fresh_state
from hf_stablespam.optim.step import step
from tests.optim.common import gradients, parameters, train

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="inductor compiles C++ for the CPU, and there is neither g++ nor clang++",
)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_compiler)])
def test_the_step_compiles_and_trains_alike(backend):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    shapes = [(6, 5), (3,)] if backend == "aot_eager" else [(6, 5)]  # one tensor takes the C++ compiler long enough
    compiled, plain = parameters(*shapes), parameters(*shapes)
    rows = gradients(plain, 5, spike_every=2)
    options = {"lr": 1e-2, "reset_interval": 3, "decay_steps": 4}
    train(plain, rows, foreach=False, fused=False, **options)
    optimizer = StableSPAM(compiled, **options)
    step = torch.compile(optimizer.step, backend=backend)
    for row in rows:
        for param, grad in zip(compiled, row, strict=True):
            param.grad = grad.clone()
        step()
    assert not torch._dynamo.utils.counters["graph_break"]
    for one, other in zip(compiled, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_loop_body_has_no_graph_break():
    torch._dynamo.reset()
    (param,) = parameters((6, 5))
    options = StableSPAM([param], reset_interval=3, decay_steps=4).param_groups[0]
    weight, state = param.detach().clone(), fresh_state(param, options)
    body = torch.compile(step, backend="aot_eager", fullgraph=True)
    for ((grad,),) in zip(gradients([param], 3), strict=True):
        body([(Batch([weight], [grad], [state]), options)])
    assert state["step"] == 3
