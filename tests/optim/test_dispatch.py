"""Which path takes which tensor."""

import pytest
import torch

from hf_stablespam.optim import StableSPAM, dispatch
from tests.optim.common import gradients, parameters, train


class Elsewhere(torch.Tensor):
    """A tensor that says it is on another device."""

    is_cpu = False
    is_cuda = False


def chosen(param=None, **options):
    param = torch.ones(20, 30) if param is None else param
    group = StableSPAM([torch.nn.Parameter(torch.ones(2))], **options).param_groups[0]
    state = {"exp_avg": torch.zeros(20, 30), "exp_avg_sq": torch.zeros(20, 30)}
    return dispatch.choose_path(param, torch.ones(20, 30), state, group)


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({}, dispatch.fused_cpu_step),
        ({"fused": True}, dispatch.fused_cpu_step),
        ({"foreach": False}, dispatch.fused_cpu_step),
        ({"foreach": True}, dispatch.foreach_step),
        ({"fused": False}, dispatch.loop_step),
        ({"fused": False, "foreach": False}, dispatch.loop_step),
        ({"clip_beta": None, "norm_betas": None, "reset_interval": None}, dispatch.plain_step),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),  # no address: workers must agree on the names
)
def test_the_choice_on_the_cpu(options, path):
    assert chosen(**options) is path


def test_subclasses_of_tensor_take_the_loop():
    assert chosen(torch.ones(20, 30).as_subclass(Elsewhere)) is dispatch.loop_step
    assert chosen(torch.ones(20, 30).as_subclass(Elsewhere), foreach=True) is dispatch.loop_step


def test_fused_forced_where_there_is_none_is_an_error():
    with pytest.raises(RuntimeError, match=r"fused=True needs parameters on CPU or CUDA.*leave fused=None"):
        chosen(torch.ones(20, 30).as_subclass(Elsewhere), fused=True)


def test_fused_forced_on_cuda_names_triton_where_it_is_missing(monkeypatch):
    class OnCuda(Elsewhere):
        is_cuda = True

    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    with pytest.raises(RuntimeError, match=r"needs triton for parameters on CUDA.*pip install triton"):
        chosen(torch.ones(20, 30).as_subclass(OnCuda), fused=True)


def test_dtypes_are_not_mixed_in_one_call():
    params = [*parameters((4, 3)), *parameters((4, 3), dtype=torch.bfloat16), *parameters((4, 3), dtype=torch.float64)]
    rows = gradients(params, 3)
    for path in ({}, {"foreach": True}):
        optimizer = train(params, rows, **path)
        assert optimizer.statistics["grad_norm"].shape == (3,)
        assert all(p.isfinite().all() for p in params)
