"""`stabilize`: the method's gradients for any optimizer, and nothing else changed."""

import copy
import io

import pytest
import torch
from torch.optim import SGD, Adafactor, AdamW

from hf_stablespam import optim
from hf_stablespam.optim import SPAM, StableSPAM, stabilize
from hf_stablespam.optim.backends import numba_ops
from tests.optim.common import TOLERANCE, assert_identical, gradients, parameters, snapshot, train

SHAPES = [(64, 40), (7,), ()]


class Lion(torch.optim.Optimizer):
    """The sign of an interpolated momentum."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["exp_avg"] = torch.zeros_like(param)
                beta1, beta2 = group["betas"]
                param -= group["lr"] * torch.lerp(param.grad, state["exp_avg"], beta1).sign()
                state["exp_avg"].lerp_(param.grad, 1 - beta2)


class AdamMini(torch.optim.Optimizer):
    """Adam with one second moment for each row."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                square = param.grad.square()
                row = square.mean(dim=-1, keepdim=True) if param.dim() else square
                if not state:
                    state["step"] = 0
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(row)
                state["step"] += 1
                state["exp_avg"].lerp_(param.grad, 0.1)
                state["exp_avg_sq"].lerp_(row, 0.001)
                root = (state["exp_avg_sq"] / (1 - 0.999 ** state["step"])).sqrt() + 1e-8
                param -= group["lr"] * state["exp_avg"] / (1 - 0.9 ** state["step"]) / root


def muon(params):
    return torch.optim.Muon(params, lr=1e-3)


def transformers_adafactor(params):
    optimization = pytest.importorskip("transformers.optimization")
    return optimization.Adafactor(params, lr=1e-3, relative_step=False, scale_parameter=False)


def bitsandbytes(name):
    def make(params):
        bnb = pytest.importorskip("bitsandbytes", reason="8-bit optimizers are in the package bitsandbytes")
        return getattr(bnb.optim, name)(params, lr=1e-3)

    return make


OPTIMIZERS = {
    "sgd": lambda params: SGD(params, lr=1e-2),
    "sgd momentum": lambda params: SGD(params, lr=1e-2, momentum=0.9),
    "adamw": AdamW,
    "adamw fused": lambda params: AdamW(params, fused=True),
    "adafactor": Adafactor,
    "adafactor of transformers": transformers_adafactor,
    "lion": Lion,
    "adam mini": AdamMini,
    "spam": SPAM,
    "lion of bitsandbytes": bitsandbytes("Lion"),
    "8-bit adamw of bitsandbytes": bitsandbytes("AdamW8bit"),
    "8-bit lion of bitsandbytes": bitsandbytes("Lion8bit"),
}
if hasattr(torch.optim, "Muon"):  # from torch 2.9 on
    OPTIMIZERS["muon"] = muon
optimizers = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def shapes_for(make):
    return [(64, 80), (40, 64)] if make is muon else [(64, 80), (7,)]


def expected_gradients(params, rows, **options):
    """The gradients that AdaClip and AdaGN make of the rows, taken from SGD's own steps with learning rate 1."""
    params = [torch.nn.Parameter(torch.zeros_like(p)) for p in params]
    optimizer = stabilize(SGD(params, lr=1.0), **options)
    changed = []
    for row in rows:
        for param in params:
            param.data.zero_()
        train(params, [row], optimizer)
        changed.append([-param.detach().clone() for param in params])
    return changed


@pytest.mark.parametrize("clip_beta", [0.9, None], ids=["clip", "no clip"])
@pytest.mark.parametrize("norm_betas", [(0.7, 0.9), None], ids=["norm", "no norm"])
@pytest.mark.parametrize("fused", [False, True], ids=["loop", "fused"])
def test_stabilised_adamw_is_stable_spam_without_resets_and_decay(clip_beta, norm_betas, fused):
    ours, theirs = parameters(*SHAPES), parameters(*SHAPES)
    rows = gradients(ours, 40, spike_every=7)
    rows[11][0][3, 3] = torch.nan
    rows[23][1][2] = torch.inf
    parts = {"clip_beta": clip_beta, "norm_betas": norm_betas}
    train(ours, rows, StableSPAM(ours, lr=1e-2, weight_decay=0.1, reset_interval=None, **parts))
    adamw = AdamW(theirs, lr=1e-2, weight_decay=0.1, foreach=False if not fused else None, fused=fused)
    train(theirs, rows, stabilize(adamw, **parts))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


def test_stabilised_adamw_is_stable_spam_without_resets_and_decay_in_double():
    ours, theirs = parameters(*SHAPES, dtype=torch.float64), parameters(*SHAPES, dtype=torch.float64)
    rows = gradients(ours, 40, spike_every=7)
    train(ours, rows, StableSPAM(ours, lr=1e-2, weight_decay=0.1, reset_interval=None))
    train(theirs, rows, stabilize(AdamW(theirs, lr=1e-2, weight_decay=0.1)))
    rtol, atol = TOLERANCE[torch.float64]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@optimizers
def test_the_optimizer_sees_the_stabilised_gradients(make):
    ours, plain = parameters(*shapes_for(make)), parameters(*shapes_for(make))
    rows = gradients(ours, 6, spike_every=3)
    train(ours, rows, stabilize(make(ours)))
    train(plain, expected_gradients(plain, rows), make(plain))
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


@optimizers
def test_a_resumed_run_is_the_same_run(make):
    params = parameters(*shapes_for(make))
    rows = gradients(params, 8, spike_every=3)
    half = parameters(*shapes_for(make))
    train(params, rows, stabilize(make(params)))
    first = train(half, rows[:4], stabilize(make(half)))
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    for when in ("before", "after"):
        buffer.seek(0)
        others = [torch.nn.Parameter(p.detach().clone()) for p in half]
        second = make(others)
        if when == "before":
            stabilize(second)
        second.load_state_dict(torch.load(buffer, weights_only=True))
        if when == "after":
            stabilize(second)
        train(others, rows[4:], second)
        assert all(torch.equal(a, b) for a, b in zip(others, params, strict=True)), when


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("when", ["before", "after"])
def test_trackers_keep_their_precision_through_a_checkpoint(dtype, when):
    params = parameters((5, 4), dtype=dtype)
    first = train(params, gradients(params, 5), stabilize(SGD(params, lr=0.1)))
    second = SGD(params, lr=0.1)
    if when == "before":
        stabilize(second)
    second.load_state_dict(first.state_dict())
    if when == "after":
        stabilize(second)
    assert second.state_dict() == first.state_dict()
    assert first.state_dict()["state"][0]["stabilizer_step"] == 5
    train(params, [[torch.zeros_like(p) for p in params]], second)
    assert second.state[params[0]] == {"momentum_buffer": None} or not second.state[params[0]]


def test_loading_a_checkpoint_without_trackers_begins_them_anew():
    params = parameters((5, 4))
    optimizer = stabilize(SGD(params, lr=0.1))
    empty = copy.deepcopy(optimizer.state_dict())
    train(params, gradients(params, 3), optimizer)
    optimizer.load_state_dict(empty)
    train(params, gradients(params, 1), optimizer)
    assert optimizer.state_dict()["state"][0]["stabilizer_step"] == 1


@optimizers
def test_removed_it_leaves_the_optimizer_as_it_was(make):
    params, plain = parameters(*shapes_for(make)), parameters(*shapes_for(make))
    rows = gradients(params, 4, spike_every=2)
    optimizer = stabilize(make(params))
    optimizer.stabilizer.remove()
    assert not hasattr(optimizer, "stabilizer")
    train(params, rows, optimizer)
    expected = train(plain, rows, make(plain))
    assert all(torch.equal(a, b) for a, b in zip(params, plain, strict=True))
    assert optimizer.state_dict()["state"].keys() == expected.state_dict()["state"].keys()
    assert not any("stabilizer" in str(state) for state in optimizer.state_dict()["state"].values())
    stabilize(optimizer)


def test_gradients_are_afterwards_as_they_were_found():
    params = parameters(*SHAPES)
    optimizer = stabilize(AdamW(params))
    for row in gradients(params, 3, spike_every=2):
        before = [grad.clone() for grad in row]
        for param, grad in zip(params, row, strict=True):
            param.grad = grad
        optimizer.step()
        assert all(param.grad is grad for param, grad in zip(params, row, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(row, before, strict=True))


@pytest.mark.parametrize("fused", [True, False])
def test_the_new_gradients_take_the_same_memory_in_every_step(fused, monkeypatch):
    """New pages of memory cost more than all else in the step. Gradients of another layout or dtype get their own."""
    if not fused:
        monkeypatch.setattr(numba_ops, "can_run", lambda *dtypes: False)
    params = parameters((64, 40), (40, 64))
    optimizer, seen = stabilize(SGD(params, lr=0.1)), []
    optimizer.register_step_pre_hook(lambda *_: seen.append([param.grad for param in params]))
    rows = gradients(params, 4)
    rows[2][0][0, 0] = torch.nan
    rows[3][0] = rows[3][0].t().contiguous().t()
    for row in rows:
        for param, grad in zip(params, row, strict=True):
            param.grad = grad
        optimizer.step()
    assert seen[0][0] is seen[1][0]
    assert seen[2][0] is None
    assert seen[3][0].stride() == (1, 64)
    assert seen[0][1] is seen[1][1] is seen[2][1] is seen[3][1]


def test_a_spike_does_not_pass():
    (weight,) = parameters((20, 20))
    rows = gradients([weight], 30)
    rows[-1][0][0, 0] = 1e4
    largest = [grad.abs().max() for (grad,) in expected_gradients([weight], rows, norm_betas=None)]
    usual = sum(row[0].abs().max() for row in rows[:-1]) / 30  # gamma3 is so near 1 that T̂ is nearly the mean
    assert float(largest[-1]) == pytest.approx(float(usual) + 1e4 / 30, rel=0.02)


def test_a_nonfinite_gradient_changes_nothing_of_its_tensor():
    params = parameters((5, 4), (3,))
    rows = gradients(params, 6)
    optimizer = train(params, rows[:3], stabilize(AdamW(params, weight_decay=0.1)))
    before, trackers = snapshot(optimizer), copy.deepcopy(optimizer.state_dict()["state"][0])
    rows[3][0][1, 1] = torch.nan
    train(params, rows[3:4], optimizer)
    assert_identical(snapshot(optimizer)[:1], before[:1])
    assert str(optimizer.state_dict()["state"][0]) == str(trackers)
    assert not torch.equal(snapshot(optimizer)[1]["weight"], before[1]["weight"])
    assert params[0].grad.isnan().any()
    assert optimizer.stabilizer.statistics["nonfinite"].tolist() == [1, 0]


def test_gradients_made_inside_the_step_are_stabilised():
    def loss(params):
        return sum((p * torch.arange(1.0, p.numel() + 1).view(p.shape)).square().sum() for p in params)

    def closure(params, optimizer):
        def evaluate():
            optimizer.zero_grad()
            value = loss(params)
            value.backward()
            return value

        return evaluate

    inside, by_name, outside = (parameters((5, 4), (3,)) for _ in range(3))
    first, second, third = (stabilize(SGD(p, lr=0.01)) for p in (inside, by_name, outside))
    for _ in range(4):
        assert first.step(closure(inside, first)) == second.step(closure=closure(by_name, second))
        closure(outside, third)()
        third.step()
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(inside, by_name, outside, strict=True))


def test_statistics_are_those_of_stable_spam():
    params = parameters(*SHAPES)
    rows = gradients(params, 5, spike_every=2)
    rows[-1][1] = None
    plain = stabilize(SGD(params, lr=0.0))
    assert plain.stabilizer.statistics == {}
    train(params, rows, plain)
    expected = train(params, rows, StableSPAM(params, lr=0.0)).statistics
    assert plain.stabilizer.statistics.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(plain.stabilizer.statistics[name], value)


def test_a_learning_rate_scheduler_goes_on_working():
    (weight,) = parameters((4,))
    optimizer = stabilize(SGD([weight], lr=0.1))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    train([weight], gradients([weight], 1), optimizer)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05


def test_float16_scaling_does_not_reach_the_trackers():
    ours, plain = parameters((8, 4)), parameters((8, 4))
    rows = gradients(ours, 3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(torch.ones(()))
    optimizer = stabilize(AdamW(ours, fused=True))
    for (row,) in rows:
        ours[0].grad = row * 2**10
        scaler.step(optimizer)
        scaler.update()
    train(plain, rows, stabilize(AdamW(plain, fused=True)))
    torch.testing.assert_close(ours[0], plain[0], rtol=0, atol=1e-6)
    optimizer.stabilizer.remove()
    assert optimizer._step_supports_amp_scaling


def test_the_optimizer_inside_accelerates_wrapper_is_stabilised():
    accelerate = pytest.importorskip("accelerate")
    params = parameters((5, 4))
    inner = AdamW(params)
    wrapped = accelerate.Accelerator(cpu=True).prepare(inner)
    assert stabilize(wrapped) is wrapped
    train(params, gradients(params, 2), wrapped)
    assert inner.stabilizer.statistics["clip_threshold"].isfinite().all()


def test_the_function_is_reached_by_its_public_names():
    assert callable(optim.stabilize)
    assert optim.stabilize is stabilize


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: stabilize(object()), TypeError, r"must be a torch\.optim\.Optimizer, got object"),
        (lambda p: stabilize(p), TypeError, r"must be a torch\.optim\.Optimizer, got list"),
        (lambda p: stabilize(stabilize(SGD(p))), ValueError, r"twice, got SGD; call optimizer\.stabilizer\.remove"),
        (lambda p: stabilize(StableSPAM(p)), TypeError, "clip and normalise by itself, got StableSPAM"),
        (lambda p: stabilize(torch.optim.LBFGS(p)), TypeError, "closure once per step, got LBFGS"),
        (lambda p: stabilize(SGD(p), clip_beta=1.5), ValueError, r"clip_beta must be in \[0, 1\), got 1\.5; None"),
        (lambda p: stabilize(SGD(p), norm_betas=0.7), ValueError, "norm_betas must be two numbers"),
        (lambda p: stabilize(SGD(p), eps=-1), ValueError, "eps must be a number >= 0, got -1"),
    ],
    ids=["no optimizer", "a list", "twice", "StableSPAM", "LBFGS", "clip_beta", "norm_betas", "eps"],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(parameters((3, 2)))


def test_updates_inside_the_backward_pass_are_refused():
    utilities = pytest.importorskip("transformers.trainer_pt_utils")
    with pytest.raises(TypeError, match="got LayerWiseDummyOptimizer, whose updates happen inside the backward"):
        stabilize(utilities.LayerWiseDummyOptimizer(optimizer_dict={}))


def test_sparse_gradients_are_refused():
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    optimizer = stabilize(SGD(embedding.parameters(), lr=0.1))
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"dense, got torch\.sparse_coo for a parameter of shape \(4, 2\)"):
        optimizer.step()


def test_a_parameter_of_another_size_than_its_gradient_is_refused():
    (param,) = parameters((20, 8))
    optimizer = stabilize(SGD([param], lr=0.1))
    param.grad = torch.ones(20, 8)
    param.data = torch.ones(2, 8)
    with pytest.raises(ValueError, match=r"must have the shape of their parameter, \(2, 8\), got \(20, 8\)"):
        optimizer.step()


class Parent(torch.optim.Optimizer):
    """Plain descent, or an error as often as it is told."""

    def __init__(self, params, lr=0.1, errors=0):
        super().__init__(params, {"lr": lr})
        self.errors, self.seen = errors, []

    @torch.no_grad()
    def step(self, closure=None):
        loss = closure() if closure is not None else None
        if self.errors:
            self.errors -= 1
            raise RuntimeError("no memory")
        for group in self.param_groups:
            for param in group["params"]:
                param -= group["lr"] * param.grad
        return loss


class Heir(Parent):
    """An optimizer that leaves the step to its parent, and looks at the gradients afterwards."""

    def step(self, closure=None):
        loss = super().step(closure)
        self.seen += [param.grad for group in self.param_groups for param in group["params"]]
        return loss


@pytest.mark.parametrize("with_closure", [False, True], ids=["gradients", "closure"])
def test_a_step_that_calls_its_parents_is_one_step(with_closure):
    Parent(parameters((1,)))  # from now on torch's hooks are in this class too
    heirs, plain = parameters((8, 4), (3,)), parameters((8, 4), (3,))
    rows = gradients(heirs, 5, spike_every=2)
    optimizer, expected = stabilize(Heir(heirs)), train(plain, rows, stabilize(Parent(plain)))
    for row in rows:

        def closure(row=row):
            for param, grad in zip(heirs, row, strict=True):
                param.grad = grad
            return 1.5

        if with_closure:
            assert optimizer.step(closure) == 1.5
        else:
            closure()
            optimizer.step()
        assert all(param.grad is grad for param, grad in zip(heirs, row, strict=True))
        assert not any(seen is grad for seen, grad in zip(optimizer.seen[-2:], row, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(heirs, plain, strict=True))
    assert optimizer.stabilizer.trackers()[heirs[0]]["step"] == 5
    assert str(optimizer.state_dict()) == str(expected.state_dict())


@pytest.mark.parametrize("kind", [Parent, Heir])
@pytest.mark.parametrize("scheduled", [None, "before", "after"])
def test_a_step_that_raises_gives_the_gradients_back(kind, scheduled):
    (weight,), (plain,) = parameters((8, 4)), parameters((8, 4))
    (first,), (second,) = rows = gradients([weight], 2)
    optimizer = kind([weight])
    for when in ("before", "after"):
        if scheduled == when:
            torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
        if when == "before":
            stabilize(optimizer)
    optimizer.errors, weight.grad = 1, first
    with pytest.raises(RuntimeError, match="no memory"):
        optimizer.step()
    assert weight.grad is first
    weight.grad = second
    optimizer.step()
    assert weight.grad is second
    reference = stabilize(Parent([plain], lr=0.0))
    train([plain], rows[:1], reference)
    reference.param_groups[0]["lr"] = 0.1
    train([plain], rows[1:], reference)
    assert torch.equal(weight, plain)


@pytest.mark.parametrize("kind", [Parent, Heir])
def test_so_does_the_next_one_where_somebody_calls_the_step_that_was_there_before(kind):
    """As accelerate's wrapper does with a gradient scaler."""
    (weight,) = parameters((8, 4))
    optimizer = kind([weight], errors=1)
    step = optimizer.step
    stabilize(optimizer)
    (first,), (second,) = gradients([weight], 2)
    weight.grad = first
    with pytest.raises(RuntimeError, match="no memory"):
        step()
    step()
    assert weight.grad is first
    weight.grad = second
    step()
    assert weight.grad is second
    assert optimizer.stabilizer.trackers()[weight]["step"] == 3


def test_removed_it_leaves_the_step_of_others_in_place():
    (weight,) = parameters((4,))
    optimizer = SGD([weight], lr=0.1)
    step = optimizer.step
    stabilize(optimizer).stabilizer.remove()
    assert optimizer.step == step
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    wrapped = optimizer.step
    stabilize(optimizer).stabilizer.remove()
    assert optimizer.step is wrapped
    train([weight], gradients([weight], 1), optimizer)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05
