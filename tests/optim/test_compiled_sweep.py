"""Gradients read by Numba: the same figures as PyTorch's, and no trouble with threads, forks and missing folders."""

import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module

import pytest
import torch

from hf_stablespam.optim import StableSPAM, cpu_sweep
from hf_stablespam.optim.pieces import Scratch

compiled_sweep = pytest.importorskip(
    "hf_stablespam.optim.compiled_sweep", reason="numba (extra: cpu) is not installed", exc_type=ImportError
)
LONG = 3 * compiled_sweep.SHORT + 5


@pytest.fixture(params=[1, 2, 3], ids="{} threads".format)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def vector(entries, dtype=torch.float32, seed=0):
    return torch.randn(entries, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("entries", [1, 1023, 1024, 1025, 5000, LONG])
def test_it_measures_what_torch_measures(entries, dtype, threads):
    values = vector(entries, dtype)
    grad_max, square, maxima = compiled_sweep.read(values)
    assert grad_max == values.abs().max()
    assert square == pytest.approx(values.double().square().sum().item(), rel=1e-5 if dtype == torch.float32 else 1e-13)
    assert maxima.tolist() == [block.abs().max().item() for block in values.split(1024)]


@pytest.mark.parametrize("entries", [700, LONG])
@pytest.mark.parametrize("place", [0, -1])
def test_what_is_not_finite_is_seen(entries, place, threads):
    for value in (math.inf, -math.inf, math.nan):
        values = vector(entries)
        values[place] = value
        grad_max, square, _ = compiled_sweep.read(values)
        assert not math.isfinite(square)
        assert grad_max == math.inf or (math.isnan(value) and math.isnan(grad_max))


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-42, -3e38])
def test_zeros_denormals_and_huge_entries_keep_their_size(value):
    values = torch.full((2000,), value)
    grad_max, square, _ = compiled_sweep.read(values)
    assert grad_max == abs(values[0].item())
    assert (square == math.inf) == (abs(value) > 1e30)


@pytest.mark.parametrize("limit", [1, 4, 100])
def test_it_finds_the_first_entries_above_a_threshold(limit):
    values = vector(5000)
    maxima = compiled_sweep.read(values).maxima
    above = (values.abs() > 2.5).nonzero().flatten().tolist()
    assert 4 < len(above) < 100
    assert compiled_sweep.find(values, maxima, 2.5, limit) == above[:limit]
    assert compiled_sweep.find(values, maxima, values.abs().max().item(), limit) == []


def test_both_ways_to_read_find_the_same_spikes(monkeypatch):
    values, scratch = vector(LONG), Scratch(torch.float32)
    found = [cpu_sweep.find_spikes(cpu_sweep.measure(values, scratch), 4.0)]
    monkeypatch.setattr(cpu_sweep, "compiled_sweep", lambda: None)
    found.append(cpu_sweep.find_spikes(cpu_sweep.measure(values, scratch), 4.0))
    compiled, by_torch = ([(spike.place, spike.value) for spike in spikes] for spikes in found)
    assert compiled == by_torch
    assert len(compiled) > 3


def test_threads_of_python_may_step_at_once(threads):
    """Numba's simplest pool of threads would end the process."""
    vectors = [vector(LONG, seed=seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        maxima = list(pool.map(lambda values: compiled_sweep.read(values).grad_max, vectors * 20))
    assert maxima == [values.abs().max().item() for values in vectors] * 20


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_may_step(threads):
    """Numba's threads would end it: "fork() called from a process already using GNU OpenMP"."""
    values = vector(LONG)
    expected = compiled_sweep.read(values).grad_max
    child = os.fork()
    if child == 0:
        os._exit(0 if compiled_sweep.read(values).grad_max == expected else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_without_a_folder_for_compiled_code_it_is_compiled_anew(monkeypatch):
    def njit(cache=False, **_):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: function

    monkeypatch.setattr(compiled_sweep, "njit", njit)
    assert compiled_sweep._compiled(nogil=True)(len) is len


def test_without_numba_pytorch_reads_the_gradient(monkeypatch):
    monkeypatch.setattr(cpu_sweep, "find_spec", lambda _: None)
    assert cpu_sweep.compiled_sweep.__wrapped__() is None


def test_a_numba_that_does_not_fit_is_named_in_a_warning(monkeypatch):
    monkeypatch.setitem(sys.modules, "hf_stablespam.optim.compiled_sweep", None)
    monkeypatch.delattr(import_module("hf_stablespam.optim"), "compiled_sweep", raising=False)
    with pytest.warns(UserWarning, match="numba is installed but cannot be used.*slower"):
        assert cpu_sweep.compiled_sweep.__wrapped__() is None


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
def test_a_gradient_with_a_graph_of_its_own_is_read():
    weight = torch.nn.Parameter(vector(2000))
    optimizer = StableSPAM([weight], lr=0.1)
    weight.square().sum().backward(create_graph=True)
    optimizer.step()
    assert weight.isfinite().all()
