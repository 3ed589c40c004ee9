"""`torch.compile` takes the step whole, and the compiled step does what the plain one does."""

import pytest
import torch

from hf_stablespam.optim import StableSPAM
from hf_stablespam.optim.adoption import fresh_state
from hf_stablespam.optim.single_tensor import stable_spam_step
from tests.optim.common import gradients, parameters, train


@pytest.mark.slow
def test_the_step_compiles_to_one_graph_and_trains_alike():
    torch._dynamo.reset()
    compiled, plain = parameters((6, 5), (3,)), parameters((6, 5), (3,))
    rows = gradients(plain, 5, spike_every=2)
    options = {"lr": 1e-2, "reset_interval": 3, "decay_steps": 4}
    train(plain, rows, foreach=False, fused=False, **options)
    optimizer = StableSPAM(compiled, **options)
    step = torch.compile(optimizer.step, backend="aot_eager")
    for row in rows:
        for param, grad in zip(compiled, row, strict=True):
            param.grad = grad.clone()
        step()
    for one, other in zip(compiled, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_loop_body_has_no_graph_break():
    torch._dynamo.reset()
    (param,) = parameters((6, 5))
    options = StableSPAM([param], reset_interval=3, decay_steps=4).param_groups[0]
    weight, state = param.detach().clone(), fresh_state(param, options)
    body = torch.compile(stable_spam_step, backend="aot_eager", fullgraph=True)
    for ((grad,),) in zip(gradients([param], 3), strict=True):
        body(weight, grad, state, options)
    assert state["step"] == 3
