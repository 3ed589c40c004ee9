"""Numba's kernels: numbers through their bits, threads, and every place where Numba cannot run."""

import os
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, get_ident

import pytest
import torch

from hf_stablespam.optim import StableSPAM
from hf_stablespam.optim.backends import numba_ops
from hf_stablespam.optim.backends import threads as backend_threads
from hf_stablespam.optim.plan import Batch, Clipping
from tests.optim.common import gradients, parameters, train
from tests.optim.test_backends import fresh_trackers
from tests.processes import run_code

pytest.importorskip("numba", reason="numba (extra: cpu) is not installed")

LONG = 9 * (1 << 16) + 5
STEP = """
    import torch, warnings
    warnings.simplefilter("always")
    from hf_stablespam.optim import StableSPAM
    torch.set_num_threads(2)
    def step():
        weight = torch.nn.Parameter(torch.ones(1200, 500))
        optimizer = StableSPAM([weight], lr=0.1)
        for _ in range(3):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        torch.testing.assert_close(weight.detach(), torch.full((1200, 500), 0.7))
"""


@pytest.fixture(params=[(1, True), (2, True), (3, True), (2, False)], ids="{0[0]} threads, OpenMP {0[1]}".format)
def threads(request, monkeypatch):
    before = torch.get_num_threads()
    number, openmp = request.param
    torch.set_num_threads(number)
    if not openmp:  # as in PyTorch's builds with another one, and after a fork
        monkeypatch.setattr(backend_threads, "_openmp", lambda process: None)
    yield number
    torch.set_num_threads(before)


def vector(entries, dtype=torch.float32, seed=0):
    return torch.randn(entries, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def measured(*grads, threshold=torch.inf):
    """Maxima, norms, and after clipping norms and counts."""
    states = [fresh_trackers(grad.dtype) for grad in grads]
    one = numba_ops.NumbaOps(Batch(list(grads), list(grads), states), {"clip_beta": 0.9})
    seen = one.measure()
    limits = torch.full_like(seen.grad_max, threshold), torch.full_like(seen.grad_max, 0.5)
    return *seen, *one.measure_clipped(seen, Clipping(None, *limits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_it_measures_what_torch_measures(dtype, threads):
    grads = [vector(entries, dtype, seed=entries) for entries in (1, 1023, 16383, 16384, 16385, 0, LONG)]
    maxima, norms, clipped_norms, counts = measured(*grads, threshold=2.5)
    for index, grad in enumerate(grads):
        exact = grad.double()
        clipped = torch.where(exact.abs() > 2.5, exact * 0.5, exact)
        assert maxima[index] == (exact.abs().max() if len(grad) else 0)
        assert counts[index] == (exact.abs() > 2.5).sum()
        torch.testing.assert_close(norms[index].double(), exact.norm(), rtol=1e-6, atol=0)
        torch.testing.assert_close(clipped_norms[index].double(), clipped.norm(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("place", [0, -1])
def test_what_is_not_finite_is_seen(place, dtype):
    for value in (torch.inf, -torch.inf, torch.nan):
        grad = vector(LONG, dtype)
        grad[place] = value
        maximum, norm, *_ = measured(grad)
        assert not norm.isfinite()
        assert maximum == torch.inf or (value != value and maximum.isnan())


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-42, -1e-20, 1e15])
@pytest.mark.parametrize("entries", [3, 20_000])
def test_zeros_denormals_and_large_entries_keep_their_size(value, entries):
    maximum, norm, *_ = measured(torch.full((entries,), value))
    assert maximum == abs(torch.tensor(value))
    exact = maximum.double().item() * entries**0.5
    assert norm.item() == pytest.approx(exact, rel=1e-5, abs=1e-45)  # neighbours among denormals are 1.4e-45 apart


@pytest.mark.parametrize("value", [1e-200, 1e-310, 1e150])
def test_in_double_entries_whose_squares_are_no_numbers_keep_their_size(value):
    """Before and after clipping."""
    grad = torch.full((20_000,), value, dtype=torch.float64)
    maximum, norm, clipped_norm, count = measured(grad, threshold=value / 4)
    assert (maximum, count) == (value, 20_000)
    assert norm.item() == pytest.approx(value * 20_000**0.5, rel=1e-12, abs=0)
    assert clipped_norm.item() == pytest.approx(value / 2 * 20_000**0.5, rel=1e-12, abs=0)


def test_bfloat16_is_rounded_to_nearest_even_as_torch_does():
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    values = bits[bits.isfinite() & (bits.abs() < 1e37) & (bits.abs() > 1e-30)]
    between = torch.cat([values, values * (1 + 2**-9), values * (1 + 2**-8), values * (1 + 3 * 2**-10)])
    weight = torch.nn.Parameter(between.bfloat16())
    expected = (weight.detach().float() * (1 - 0.1 * 0.01)).bfloat16()
    optimizer = StableSPAM([weight], lr=0.1, weight_decay=0.01, fused=True)
    train([weight], [[torch.zeros_like(weight)]], optimizer)
    assert torch.equal(weight.detach(), expected)


def test_stochastic_rounding_is_unbiased_seeded_and_keeps_what_is_not_finite():
    def rounded(seed):
        torch.manual_seed(seed)
        values = torch.tensor([1.0, -3.0, 2.0**-20, torch.inf]).repeat_interleave(50_000)
        weight = torch.nn.Parameter(values.bfloat16())
        optimizer = StableSPAM([weight], lr=2**-9, weight_decay=1.0, stochastic_rounding=True, fused=True)
        train([weight], [[torch.zeros_like(weight)]], optimizer)
        return weight.detach().view(4, -1)

    first = rounded(1)
    assert torch.equal(first, rounded(1))
    assert not torch.equal(first, rounded(2))
    exact = torch.tensor([1.0, -3.0, 2.0**-20]) * (1 - 2**-9)
    torch.testing.assert_close(first[:3].double().mean(1), exact.double(), rtol=2e-5, atol=0)
    assert (first[3] == torch.inf).all()
    halves = first[0].view(2, -1).double()  # neighbours are rounded independently
    assert abs(torch.corrcoef(halves)[0, 1]) < 0.03


def test_threads_of_python_may_step_at_once(threads):
    """Numba's own simplest pool of threads would end the process."""
    vectors = [vector(LONG, seed=seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        maxima = list(pool.map(lambda values: measured(values)[0].item(), vectors * 20))
    assert maxima == [values.abs().max().item() for values in vectors] * 20


def test_all_threads_are_called_and_an_error_of_any_is_raised(threads):
    barrier, names, here = Barrier(threads, timeout=60), [], get_ident()

    def function():
        barrier.wait()
        names.append(get_ident())

    backend_threads.call_on(threads, function)
    assert len(set(names)) == threads
    assert here in names

    def fail():
        barrier.wait()
        if get_ident() != here:
            raise KeyboardInterrupt("by a user")

    if threads > 1:
        with pytest.raises(KeyboardInterrupt, match="by a user"):
            backend_threads.call_on(threads, fail)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PyTorch brings GNU OpenMP for Linux only")
def test_pytorch_s_openmp_is_found():
    assert backend_threads._openmp(os.getpid()) is not None
    assert backend_threads._openmp(-1) is None


def test_nobody_s_number_of_threads_changes():
    import numba

    before = numba.get_num_threads(), torch.get_num_threads()
    params = parameters((600, 500))
    train(params, gradients(params, 2))
    assert (numba.get_num_threads(), torch.get_num_threads()) == before


def run(script: str, **environment: str) -> str:
    """Warnings of a new process that steps; it must come to its end."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        return run_code(textwrap.dedent(STEP) + textwrap.dedent(script))[1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_process_steps_too():
    """Numba's own threads would end it, and OpenMP's are not there: PyTorch's own operations wait for them forever."""
    script = """
        import os
        from hf_stablespam.optim.backends.threads import call_on
        step()
        child, called = os.fork(), []
        if child == 0:
            torch.set_num_threads(1)
            step(), step()
            call_on(2, lambda: called.append(torch.ones(3)))
            os._exit(not called)
        assert os.waitpid(child, 0)[1] == 0
        step()
    """
    assert "UserWarning" not in run(script)


def test_without_numba_disabled_or_unfit_torch_serves_after_one_warning():
    broken = "import sys; sys.modules[{!r}] = None; step(), step()".format
    assert run("step(), step()", NUMBA_DISABLE_JIT="1").count("UserWarning: NUMBA_DISABLE_JIT is set; unset it") == 1
    unfit = run(broken("numba.core"))  # as where it does not fit the NumPy beside it: its import fails
    assert unfit.count("UserWarning: numba is installed but cannot be used: ") == 1
    message = run(broken("numba"))
    assert message.count("UserWarning: numba is not installed; install it with: pip install 'hf_stablespam[cpu]'") == 1


@pytest.mark.slow
def test_a_cache_that_cannot_be_read_or_written_costs_a_warning(tmp_path):
    """Truncated files, and a folder that is none: compiled anew, or not at all, but no error."""
    env = {"NUMBA_CACHE_DIR": str(tmp_path)}
    assert "UserWarning" not in run("step()", **env)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[:10])
    assert run("step(), step()", **env).count("UserWarning: Numba's cache of compiled code cannot be used") == 1
    no_folder = tmp_path / "file"
    no_folder.write_text("")
    run("step()", NUMBA_CACHE_DIR=str(no_folder))


def test_a_compiler_that_fails_leaves_the_step_to_torch():
    script = """
        from hf_stablespam.optim.backends import numba_ops
        numba_ops._try = lambda *_: 1 / 0
        step(), step()
    """
    assert run(script).count("UserWarning: Numba cannot compile or run here: ZeroDivisionError") == 1


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
def test_a_gradient_with_a_graph_of_its_own_is_read():
    weight = torch.nn.Parameter(vector(2000))
    optimizer = StableSPAM([weight], lr=0.1)
    weight.square().sum().backward(create_graph=True)
    optimizer.step()
    assert weight.isfinite().all()
