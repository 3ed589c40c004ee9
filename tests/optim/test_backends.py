"""The backends against the reference and each other: which takes what, every layout, few and many spikes, extremes."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from hf_stablespam.optim import StableSPAM, backends, step
from hf_stablespam.optim.backends import numba_ops, torch_ops
from hf_stablespam.optim.backends.loop import Loop
from hf_stablespam.optim.backends.numba_ops import NumbaOps
from hf_stablespam.optim.backends.torch_ops import TorchOps
from hf_stablespam.optim.plan import MOMENTS, Batch
from hf_stablespam.optim.stabilize.stabilizer import check_stabilize_options
from hf_stablespam.optim.state.fresh import TRACKERS
from tests.optim.common import PATHS, TOLERANCE, assert_identical, gradients, parameters, snapshot, train
from tests.processes import run_code
from tests.reference.stable_spam import Hyperparameters, Reference

SHAPES = [(37, 21), (130,), (), (3, 4, 5), (64,)]
FAST = {name: path for name, path in PATHS.items() if name != "loop"}
LOOP = PATHS["loop"]
OFF = {"clip_beta": None, "norm_betas": None, "reset_interval": None}
fast = pytest.mark.parametrize("path", FAST.values(), ids=FAST)


@pytest.fixture(params=["on the host", "on a device"])
def small(request, monkeypatch):
    """Tensors cut into many pieces; PyTorch's operations take them alone, or many at once as on an accelerator."""
    monkeypatch.setattr(torch_ops, "HOSTS", ("cpu",) if request.param == "on the host" else ())
    for limit in ("HOST_BUCKET", "LARGE_BUCKET"):
        monkeypatch.setattr(torch_ops, limit, 64)
    monkeypatch.setattr(torch_ops, "ROW", 8)


class Subclass(torch.Tensor):
    """A tensor of a kind of its own."""


def kind(param=None, grad=None):
    param = torch.ones(20, 30) if param is None else param
    moments = {name: torch.zeros_like(param) for name in MOMENTS}
    return backends.kind_of(param, torch.ones_like(param) if grad is None else grad, moments)


def chosen(of=None, **options):
    group = StableSPAM([torch.nn.Parameter(torch.ones(2))], **options).param_groups[0]
    return backends.choose_backend(of or kind(), group)


@pytest.mark.parametrize(
    ("options", "backend"),
    [
        ({}, NumbaOps),
        ({"fused": True}, NumbaOps),
        ({"foreach": False}, NumbaOps),
        ({"foreach": True}, TorchOps),
        ({"fused": False}, TorchOps),
        ({"fused": False, "foreach": False}, Loop),
    ],
    ids=str,
)
def test_the_choice_on_the_cpu(options, backend):
    assert chosen(**options) is backend


def test_the_choice_is_announced_once_by_the_main_process(monkeypatch):
    code = """
        import torch, warnings
        warnings.simplefilter("error", UserWarning)
        from hf_stablespam.optim import StableSPAM
        for dtype in (torch.float32, torch.float64):
            weight = torch.nn.Parameter(torch.ones(3, dtype=dtype))
            for path in ({"foreach": True}, {"foreach": True}, {"foreach": False, "fused": False}):
                optimizer = StableSPAM([weight], **path)
                weight.grad = torch.ones_like(weight)
                optimizer.step()
    """
    for rank, expected in (("0", ["PyTorch's operations", "a loop over the tensors"]), ("1", [])):
        monkeypatch.setenv("RANK", rank)
        errors = run_code(code)[1]
        said = [line for line in errors.splitlines() if line.startswith("[hf_stablespam] optimizer steps")]
        assert said == [f"[hf_stablespam] optimizer steps on cpu are made by {what}" for what in expected]


def test_with_nothing_switched_on_the_update_is_torchs_own():
    assert chosen(**OFF).__name__ == "AdamWNumbaOps"
    assert not chosen(**OFF, state_dtype=torch.float32).__name__.startswith("AdamW")


def test_subclasses_of_tensor_take_the_loop():
    assert chosen(kind(torch.ones(20, 30).as_subclass(Subclass))) is Loop
    assert chosen(kind(torch.ones(20, 30).as_subclass(Subclass)), foreach=True) is Loop


def test_odd_layouts_and_float16_take_torchs_operations():
    weight = torch.ones(12, 20)
    assert chosen(kind(weight)) is NumbaOps
    for grad in (torch.ones(20, 12).t(), torch.ones(1, 20).expand(12, 20), torch.ones(12, 20).half()):
        assert chosen(kind(weight, grad)) is TorchOps


def test_fused_forced_where_there_is_none_is_an_error():
    with pytest.raises(RuntimeError, match=r"fused=True needs parameters on CPU or CUDA, got one on meta; leave fused"):
        chosen(kind(torch.ones(20, 30, device="meta")), fused=True)


def test_fused_forced_on_cuda_names_triton_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(backends, "has_triton", lambda: False)
    with pytest.raises(RuntimeError, match=r"needs triton for parameters on CUDA.*pip install triton"):
        chosen(kind()._replace(device=torch.device("cuda")), fused=True)


def test_dtypes_are_not_mixed_in_one_call():
    params = [*parameters((4, 3)), *parameters((4, 3), dtype=torch.bfloat16), *parameters((4, 3), dtype=torch.float64)]
    rows = gradients(params, 3)
    for path in ({}, {"foreach": True}):
        optimizer = train(params, rows, **path)
        assert optimizer.statistics["grad_norm"].shape == (3,)
        assert all(p.isfinite().all() for p in params)


@fast
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("maximize", [False, True])
def test_they_follow_the_reference(small, path, dtype, maximize):
    params = parameters(*SHAPES, dtype=dtype)
    rows = gradients(params, 25, spike_every=3)
    options = {"lr": 1e-2, "weight_decay": 0.1, "reset_interval": 7, "decay_steps": 12}
    references = [Reference(p, Hyperparameters(**options)) for p in params]
    train(params, rows, maximize=maximize, **options, **path)
    rtol, atol = TOLERANCE[dtype]
    for index, reference in enumerate(references):
        for row in rows:
            reference.step(-row[index] if maximize else row[index])
        torch.testing.assert_close(params[index].detach().double(), reference.weight, rtol=rtol, atol=10 * atol)


@fast
def test_tensors_of_many_chunks_follow_the_loop(path):
    params, twins = (parameters((300, 200), (7,), (16384,), (150, 300)) for _ in range(2))
    rows = gradients(params, 5, spike_every=2)
    optimizer, loop = train(params, rows, lr=1e-2, **path), train(twins, rows, lr=1e-2, **LOOP)
    for one, other in zip(snapshot(optimizer), snapshot(loop), strict=True):
        for name in other:
            torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=2e-6 if name == "weight" else 5e-7)
    for name, value in loop.statistics.items():
        torch.testing.assert_close(optimizer.statistics[name], value, rtol=1e-5, atol=0)


@fast
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spikes", [1, 5, 37 * 21 // 2, 37 * 21], ids="{} spikes".format)
def test_few_and_many_spikes_are_counted_and_clipped_as_by_the_loop(small, path, spikes, dtype):
    params, twins = parameters((37, 21), dtype=dtype), parameters((37, 21), dtype=dtype)
    rows = gradients(params, 8)
    for row in rows[3::2]:
        places = torch.randperm(37 * 21, generator=torch.Generator().manual_seed(spikes))[:spikes]
        row[0].view(-1)[places] = (torch.arange(spikes) % 3 + 1).to(dtype) * (-1) ** torch.arange(spikes)
    optimizer, loop = StableSPAM(params, lr=1e-2, **path), StableSPAM(twins, lr=1e-2, **LOOP)
    for row in rows:
        train(params, [row], optimizer)
        train(twins, [row], loop)
        for name in ("clipped", "stable_norm", "clip_threshold"):
            torch.testing.assert_close(optimizer.statistics[name], loop.statistics[name], rtol=1e-5, atol=0)
    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(params[0], twins[0], rtol=rtol, atol=10 * atol)


@fast
@pytest.mark.parametrize("values", ["zeros", "tiny", "all spikes", "one sign"])
def test_unusual_gradients_follow_the_reference(small, path, values):
    params = parameters((37, 21), dtype=torch.float64)
    rows = gradients(params, 9)
    unusual = {
        "zeros": lambda g: g * 0,
        "tiny": lambda g: g * 1e-20,
        "all spikes": lambda g: g.sign() * 50,
        "one sign": lambda g: -g.abs() * 30,
    }[values]
    rows = [[unusual(row[0])] if step % 3 == 2 else row for step, row in enumerate(rows)]
    reference = Reference(params[0], Hyperparameters(lr=1e-2))
    optimizer = train(params, rows[:6], lr=1e-2, **path)
    assert values != "all spikes" or optimizer.statistics["clipped"].item() == 37 * 21
    train(params, rows[6:], optimizer)
    for (grad,) in rows:
        reference.step(grad)
    torch.testing.assert_close(params[0].detach(), reference.weight, rtol=0, atol=1e-9)


@pytest.mark.parametrize("path", [*PATHS.values(), {"rank": 4}], ids=[*PATHS, "galore"])
@pytest.mark.parametrize("parts", [{}, OFF], ids=["all", "none"])
def test_without_eps_an_entry_that_never_had_a_gradient_keeps_its_weight(path, parts):
    (weight,) = parameters((37, 21))
    before = weight.detach().clone()
    grad = torch.randn(37, 21)
    grad[5:] = 0
    train([weight], [[grad]] * 3, eps=0.0, lr=1e-2, **parts, **path)
    assert weight.isfinite().all()
    assert "rank" in path or torch.equal(weight[5:], before[5:])
    assert not torch.equal(weight[:5], before[:5])


def layouts(seed=0):
    torch.manual_seed(seed)
    base = torch.randn(4, 6, 8, 10)
    return {
        "channels last": base.clone().to(memory_format=torch.channels_last),
        "transposed": torch.randn(12, 20).t(),
        "strided": torch.randn(12, 40)[:, ::2],
        "offset": torch.randn(500)[100:300],
        "size one": torch.randn(1, 30, 1),
    }


@fast
@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("grad_layout", ["the same", "contiguous"])
def test_every_layout_gives_what_a_contiguous_tensor_gives(small, path, layout, grad_layout):
    value = layouts()[layout]
    odd, plain = torch.nn.Parameter(value), torch.nn.Parameter(value.contiguous().clone())
    assert odd.stride() == value.stride()
    one, two = StableSPAM([odd], lr=0.1, **path), StableSPAM([plain], lr=0.1, **path)
    for (grad,) in gradients([plain], 6, spike_every=3):
        odd.grad = torch.empty_like(odd).copy_(grad) if grad_layout == "the same" else grad.clone()
        plain.grad = grad.clone()
        one.step()
        two.step()
    torch.testing.assert_close(odd.detach().contiguous(), plain.detach(), rtol=1e-5, atol=1e-5)


def test_states_go_from_backend_to_backend(small):
    choices = [{}, {"foreach": True}, LOOP, {"foreach": False}]
    params = parameters(*SHAPES, dtype=torch.float64)
    rows = gradients(params, 16, spike_every=3)
    options = {"lr": 1e-2, "reset_interval": 6}
    references = [Reference(p, Hyperparameters(**options)) for p in params]
    saved = None
    for turn in range(8):
        optimizer = StableSPAM(params, **options)
        if saved is not None:
            optimizer.load_state_dict(saved)
        optimizer.param_groups[0].update({"foreach": None, "fused": None} | choices[turn % 4])
        saved = train(params, rows[2 * turn : 2 * turn + 2], optimizer).state_dict()
    for index, reference in enumerate(references):
        for row in rows:
            reference.step(row[index])
        torch.testing.assert_close(params[index].detach(), reference.weight, rtol=0, atol=1e-9)


def test_switching_everything_off_midway_goes_on_with_the_moments():
    params, twins = parameters((200, 100)), parameters((200, 100))
    rows = gradients(params, 6)
    by_numba, by_loop = train(params, rows[:3]), train(twins, rows[:3], **LOOP)
    for optimizer in (by_numba, by_loop):
        optimizer.param_groups[0].update(OFF)
    train(params, rows[3:], by_numba)
    train(twins, rows[3:], by_loop)
    torch.testing.assert_close(params[0], twins[0], rtol=1e-5, atol=1e-6)


@fast
def test_a_resumed_run_of_large_tensors_is_the_same_run(path):
    straight, halfway = parameters((200, 100), (300,)), parameters((200, 100), (300,))
    rows = gradients(straight, 10, spike_every=3)
    expected = train(straight, rows, reset_interval=4, **path)
    saved = train(halfway, rows[:5], reset_interval=4, **path).state_dict()
    second = StableSPAM(halfway)
    second.load_state_dict(saved)
    assert_identical(snapshot(train(halfway, rows[5:], second)), snapshot(expected))


@pytest.mark.parametrize(("path", "share"), [("numba", 0.1), ("torch", 1)])
@pytest.mark.parametrize("spread", ["a few spikes", "nothing but spikes"])
def test_no_temporary_is_large(path, share, spread):
    params = parameters(*[(600, 512)] * 6)
    rows = gradients(params, 2, spike_every=2)
    if spread == "nothing but spikes":
        rows[1] = [grad.sign() * 100 for grad in rows[1]]
    optimizer = train(params, rows[:1], **PATHS[path])
    for param, grad in zip(params, rows[1], strict=True):
        param.grad = grad
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        optimizer.step()
    sizes = [e.nbytes() for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert sizes
    assert max(sizes) <= share * params[0].nbytes, sorted(sizes)[-5:]


@fast
def test_autograd_notices_that_weights_have_changed(path):
    (weight,) = parameters((4, 3))
    loss = weight.square().sum()
    loss.backward(retain_graph=True)
    StableSPAM([weight], **path).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


RESCALED = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
KINDS = ["calm", "one spike", "many spikes", "tiny", "zeros", "nan", "inf"]


def spiked(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    grad = torch.randn(shape, dtype=torch.float64) * (1e-30 if kind == "tiny" else 1)
    grad.view(-1)[: {"one spike": 1, "many spikes": 200}.get(kind, 0)] *= 50
    if kind in ("nan", "inf"):
        grad.view(-1)[0] = float(kind)
    grad = grad.to(dtype) * (kind != "zeros")
    return grad.to(memory_format=torch.channels_last) if len(shape) == 4 else grad


def fresh_trackers(dtype):
    precise = torch.promote_types(dtype, torch.float32)
    names = ("step", "moment_step", "adopted_at")
    return {name: torch.zeros((), dtype=precise if name in TRACKERS else None) for name in (*names, *TRACKERS)}


@fast
@pytest.mark.parametrize("dtype", RESCALED, ids=str)
@pytest.mark.parametrize("shape", [(300, 70), (), (4, 8, 5, 3)], ids=["matrix", "number", "channels last"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_rescaled_gradient_is_that_of_the_loop(kind, shape, dtype, path):
    torch.manual_seed(0)
    options = check_stabilize_options(0.9, (0.7, 0.9), 1e-8)
    ours, theirs = fresh_trackers(dtype), fresh_trackers(dtype)
    for number in range(4):
        grad = spiked(kind if number == 3 else "calm", shape, dtype)
        before = grad.clone()
        ((expected, (wanted,)),) = step.rescale([(Batch([grad], [grad], [theirs]), options | LOOP)])
        ((seen, (found,)),) = step.rescale([(Batch([grad], [grad], [ours]), options | path)])
        torch.testing.assert_close(seen.statistics, expected.statistics, equal_nan=True, rtol=1e-5, atol=0)
        torch.testing.assert_close({name: ours[name] for name in theirs}, theirs, rtol=1e-5, atol=0)
        torch.testing.assert_close(grad, before, equal_nan=True, rtol=0, atol=0)
        assert found.stride() == grad.stride()
        torch.testing.assert_close(found, wanted, rtol=RESCALED[dtype], atol=1e-7)
    assert bool(seen.statistics["nonfinite"]) == (kind in ("nan", "inf"))
    if "spike" in kind and shape:
        assert seen.statistics["clipped"] > 0


def test_what_cannot_be_cut_is_rescaled_whole(small):
    options = check_stabilize_options(0.9, (0.7, 0.9), 1e-8)
    for param, grad in [
        (torch.ones(30, 20).t(), torch.ones(20, 30)),
        (torch.ones(20, 30), torch.ones(30).expand(20, 30)),
    ]:
        ((_, (new,)),) = step.rescale(
            [(Batch([param], [grad], [fresh_trackers(grad.dtype)]), options | PATHS["torch"])]
        )
        torch.testing.assert_close(new, torch.full_like(new, 600**-0.5))


def test_numba_is_what_these_tests_ran():
    pytest.importorskip("numba", reason="numba (extra: cpu) is not installed: its cases above ran PyTorch's operations")
    assert numba_ops.load() is not None
