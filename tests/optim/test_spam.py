"""SPAM against its float64 reference; sparse momentum, its masks and its memory; the state; bad input."""

import copy
import io

import pytest
import torch

from hf_stablespam.optim import SPAM, StableSPAM
from hf_stablespam.optim.state.sparse_mask import draw_mask, kept_entries, mask_indices
from tests.optim.common import TOLERANCE, assert_identical, gradients, parameters, snapshot, train
from tests.reference.spam import Hyperparameters, Reference

SHAPES = [(17, 9), (6,), ()]
# Everything happens within some 30 steps: clipping, two resets, both warm-ups.
OPTIONS = {
    "lr": 1e-2,
    "weight_decay": 0.1,
    "threshold": 50.0,
    "clip_delay": 4,
    "reset_interval": 12,
    "warmup_steps": 5,
}


def kept_of(optimizer, param):
    """The mask of a parameter as bools of its shape; all true where it has none."""
    state = optimizer.state[param]
    if "mask" not in state:
        return torch.ones_like(param, dtype=torch.bool)
    group = next(group for group in optimizer.param_groups if any(p is param for p in group["params"]))
    kept = torch.zeros(param.numel(), dtype=torch.bool)
    kept[mask_indices(state["mask"], param.numel(), group["density"])] = True
    return kept.view(param.shape)


def assert_follows_the_reference(params, options, density, tolerance):
    """Thirty steps with spikes; returns how many entries were clipped."""
    references = [Reference(p, Hyperparameters(**options)) for p in params]
    rows = gradients(params, 30, spike_every=5)
    rows[7][0][0, 1] = torch.nan
    optimizer = SPAM(params, **options, density=density)
    clipped = 0
    for row in rows:
        train(params, [row], optimizer)
        clipped += optimizer.statistics["clipped"].sum()
        for param, grad, reference in zip(params, row, references, strict=True):
            reference.step(grad, kept_of(optimizer, param))
            rtol, atol = tolerance
            torch.testing.assert_close(param.detach().double(), reference.weight, rtol=rtol, atol=atol)
    assert references[0].resets == 2
    return clipped


@pytest.mark.parametrize("density", [1.0, 0.3], ids=["dense", "sparse"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_it_is_the_reference(dtype, density):
    params = parameters(*SHAPES, dtype=dtype)
    assert assert_follows_the_reference(params, OPTIONS, density, TOLERANCE[dtype]) >= 5


@pytest.mark.parametrize("density", [1.0, 0.3], ids=["dense", "sparse"])
def test_it_is_the_reference_in_bfloat16(density):
    params = parameters(*SHAPES, dtype=torch.bfloat16)
    for param in params:
        param.data.mul_(0.05)  # where the distance of two bfloat16 numbers is a tenth of a step
    # The paper's threshold: a lower one decides over many ordinary entries, and rounding turns some decisions.
    assert assert_follows_the_reference(params, {**OPTIONS, "threshold": 5000.0}, density, (0.0, 8e-3)) >= 5


@pytest.mark.parametrize("density", [1.0, 0.3], ids=["dense", "sparse"])
def test_small_gradients_do_not_vanish_in_float16(density):
    """Their squares do, and M/(√V + ε) was M/ε, a thousand times the step."""
    (half,), (single,) = parameters((8, 8), dtype=torch.float16), parameters((8, 8))
    for param in (half, single):
        optimizer = train([param], [[torch.full_like(param, 1e-3)]] * 3, SPAM([param], lr=1e-2, density=density))
        assert optimizer.state[param]["exp_avg_sq"].dtype == torch.float32
    torch.testing.assert_close(half.float(), single, rtol=0, atol=TOLERANCE[torch.float16][1])


@pytest.mark.parametrize("shape", [(), (1,)])
def test_the_learning_rate_may_be_a_tensor(shape):
    ours, theirs = parameters(*SHAPES), parameters(*SHAPES)
    rows = gradients(ours, 3)
    train(ours, rows, SPAM(ours, lr=torch.full(shape, 1e-2), weight_decay=0.1))
    train(theirs, rows, SPAM(theirs, lr=1e-2, weight_decay=0.1))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("density", [1.0, 0.3], ids=["dense", "sparse"])
def test_a_reset_that_falls_on_a_gradient_that_is_not_finite_is_made(density):
    (weight,) = params = parameters((8, 8))
    optimizer = train(params, gradients(params, 3), SPAM(params, reset_interval=4, density=density))
    before, kept = weight.detach().clone(), kept_of(optimizer, weight)
    train(params, [[torch.full((8, 8), torch.nan)]], optimizer)
    state = optimizer.state[weight]
    assert (state["step"], state["resets"], state["moment_step"]) == (4, 1, 0)
    assert torch.equal(weight, before)
    assert not state["exp_avg"].any()
    assert torch.equal(kept_of(optimizer, weight), kept) == (density == 1)
    assert optimizer.statistics["reset"].item() == optimizer.statistics["nonfinite"].item() == 1


@pytest.mark.parametrize("part", ["threshold", "reset_interval", "warmup_steps", "weight_decay", "clip_delay"])
def test_each_part_matters(part):
    without = {**OPTIONS, part: {"warmup_steps": 0, "weight_decay": 0.0, "clip_delay": 29}.get(part)}
    with_it, without_it = parameters((17, 9)), parameters((17, 9))
    rows = gradients(with_it, 30, spike_every=5)
    train(with_it, rows, SPAM(with_it, **OPTIONS))
    train(without_it, rows, SPAM(without_it, **without))
    assert (with_it[0] - without_it[0]).abs().max() > 1e-3


def test_everything_off_is_adamw():
    ours, theirs = parameters(*SHAPES), parameters(*SHAPES)
    rows = gradients(ours, 20, spike_every=3)
    train(ours, rows, SPAM(ours, lr=1e-2, weight_decay=0.1, threshold=None, reset_interval=None))
    train(theirs, rows, torch.optim.AdamW(theirs, lr=1e-2, eps=1e-6, weight_decay=0.1))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


def test_a_spike_is_cut_to_the_history_by_hand():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = SPAM([weight], lr=1.0, betas=(0.0, 0.5), eps=0.0, threshold=4.0, clip_delay=1)
    for grad in (1.0, 100.0):
        weight.grad = torch.full((1,), grad)
        optimizer.step()
    # V = 0.5 after the first step; 100² > 4·0.5, so g = √2 and V = 0.25 + 1; V̂ = 1.25 / 0.75
    torch.testing.assert_close(weight.detach(), torch.tensor([-1 - 2**0.5 / (1.25 / 0.75) ** 0.5]))
    assert optimizer.statistics["clipped"] == 1
    assert optimizer.statistics["stable_norm"] == pytest.approx(2**0.5)


def test_an_entry_without_history_is_not_clipped_for_ever():
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = SPAM([weight], lr=1.0, clip_delay=2)
    for step in range(6):
        weight.grad = torch.tensor([1.0, 1.0 if step == 5 else 0.0])
        optimizer.step()
    assert weight[1] < 0


def test_a_reset_restarts_the_bias_correction():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = SPAM([weight], lr=1.0, eps=0.0, reset_interval=3, warmup_steps=0, threshold=None)
    for grad in (5.0, 5.0, -0.001):
        before = weight.detach().clone()
        weight.grad = torch.full((1,), grad)
        optimizer.step()
    torch.testing.assert_close(weight.detach() - before, torch.ones(1))  # a first step of Adam is one lr
    assert optimizer.statistics["reset"] == 1


def test_gradients_are_not_changed():
    params = parameters((17, 9))
    rows = gradients(params, 12, spike_every=3)
    optimizer = SPAM(params, **OPTIONS, density=0.5)
    for row in rows:
        before = row[0].clone()
        params[0].grad = row[0]
        optimizer.step()
        assert torch.equal(params[0].grad, before)


def test_only_the_kept_entries_move_until_the_next_reset():
    params = parameters((20, 30), (5,))
    start = [p.detach().clone() for p in params]
    optimizer = SPAM(params, lr=0.1, weight_decay=0.1, density=0.25, reset_interval=5)
    train(params, gradients(params, 4), optimizer)
    first = kept_of(optimizer, params[0])
    assert first.sum() == 150
    assert torch.equal(params[0] != start[0], first)
    assert (params[1] != start[1]).all()
    train(params, gradients(params, 1, seed=5), optimizer)
    second = kept_of(optimizer, params[0])
    assert second.sum() == 150
    assert not torch.equal(first, second)
    assert torch.equal(params[0] != start[0], first | second)


def test_two_parameters_and_two_seeds_have_masks_of_their_own():
    masks = []
    for seed in (0, 0, 1):
        params = parameters((20, 30), (20, 30))
        optimizer = train(params, gradients(params, 1), SPAM(params, density=0.5, seed=seed))
        masks.append([optimizer.state[p]["mask"] for p in params])
    assert not torch.equal(masks[0][0], masks[0][1])
    assert torch.equal(masks[0][0], masks[1][0])
    assert not torch.equal(masks[0][0], masks[2][0])


def test_a_weight_that_is_not_contiguous_is_updated():
    weight = torch.nn.Parameter(torch.ones(6, 4).t())
    optimizer = SPAM([weight], lr=0.1, density=0.5)
    train([weight], [[torch.ones(4, 6)]], optimizer)
    assert torch.equal(weight != 1, kept_of(optimizer, weight))


@pytest.mark.parametrize("density", [1.0, 0.5, 0.1])
def test_the_state_is_as_small_as_the_density_says(density):
    (weight,) = parameters((256, 128))
    optimizer = train([weight], gradients([weight], 1), SPAM([weight], density=density))
    held = sum(value.numel() * value.element_size() for value in optimizer.state[weight].values())
    bits_per_entry = 64 * density + (1 if density < 1 else 0)
    assert held == pytest.approx(bits_per_entry / 8 * weight.numel(), rel=1e-3, abs=12)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 1000])
@pytest.mark.parametrize("density", [0.001, 0.3, 0.999, 1.0])
def test_masks_keep_their_count_and_pack_into_bits(count, density):
    mask = draw_mask(count, density, seed=3, device=torch.device("cpu"))
    indices = mask_indices(mask, count, density)
    assert mask.numel() == -(-count // 8)
    assert indices.numel() == kept_entries(count, density) == max(1, round(count * density))
    assert torch.equal(indices, indices.unique())
    assert indices.max() < count


def test_masks_keep_every_entry_equally_often():
    hits = torch.zeros(50)
    for seed in range(400):
        hits[mask_indices(draw_mask(50, 0.3, seed, torch.device("cpu")), 50, 0.3)] += 1
    assert (hits / 400 - 0.3).abs().max() < 0.1  # 4 standard deviations are 0.092


@pytest.mark.parametrize("density", [1.0, 0.3], ids=["dense", "sparse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resumed_run_is_the_same_run(dtype, density):
    straight, half = parameters(*SHAPES, dtype=dtype), parameters(*SHAPES, dtype=dtype)
    rows = gradients(straight, 30, spike_every=4)
    expected = snapshot(train(straight, rows, SPAM(straight, **OPTIONS, density=density)))
    first = train(half, rows[:14], SPAM(half, **OPTIONS, density=density))
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    others = [torch.nn.Parameter(p.detach().clone()) for p in half]
    second = SPAM(others)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    torch.rand(7)  # masks do not depend on the global generator
    train(others, rows[14:], second)
    assert_identical(snapshot(second), expected)


def test_a_copy_goes_on_alike():
    params = parameters(*SHAPES)
    rows = gradients(params, 20, spike_every=4)
    optimizer = train(params, rows[:10], SPAM(params, **OPTIONS, density=0.5))
    twin = copy.deepcopy(optimizer)
    train([p for group in twin.param_groups for p in group["params"]], rows[10:], twin)
    train(params, rows[10:], optimizer)
    assert_identical(snapshot(twin), snapshot(optimizer))


def test_nothing_exists_before_the_first_step_and_zero_gradients_change_nothing():
    params = parameters(*SHAPES)
    before = [p.detach().clone() for p in params]
    optimizer = SPAM(params, lr=0.0)
    assert not optimizer.state
    assert optimizer.statistics == {}
    train(params, [[torch.zeros_like(p) for p in params]] * 2, optimizer)
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert all(value.isfinite().all() for entry in snapshot(optimizer) for value in entry.values())


def test_a_reset_from_outside_warms_up_and_redraws():
    params = parameters((20, 30))
    optimizer = train(params, gradients(params, 3), SPAM(params, density=0.5, lr=1.0, reset_interval=None))
    mask, before = optimizer.state[params[0]]["mask"].clone(), params[0].detach().clone()
    optimizer.reset_moments()
    assert not torch.equal(optimizer.state[params[0]]["mask"], mask)
    train(params, gradients(params, 1), optimizer)
    assert (params[0].detach() - before).abs().max() == pytest.approx(0.01, rel=1e-3)


def test_a_closure_returns_its_loss_and_groups_have_their_own_options():
    first, second = parameters((4, 3), (4, 3))
    optimizer = SPAM([{"params": [first], "density": 0.5}, {"params": [second], "lr": 0.0}])

    def closure():
        loss = first.sum() + second.sum()
        loss.backward()
        return loss

    before = second.detach().clone()
    assert optimizer.step(closure).item() != 0
    assert "mask" in optimizer.state[first]
    assert "mask" not in optimizer.state[second]
    assert torch.equal(second, before)


def test_statistics_follow_the_parameters():
    params = parameters((5, 4), (3,), (2,))
    optimizer = SPAM(params)
    train(params, [[torch.full((5, 4), 2.0), None, torch.tensor([torch.inf, 1.0])]], optimizer)
    statistics = optimizer.statistics
    assert statistics["grad_max"].tolist() == [2, 0, torch.inf]
    assert statistics["grad_norm"][0] == pytest.approx(2 * 20**0.5)
    assert statistics["nonfinite"].tolist() == [0, 0, 1]
    assert statistics.keys() == train(params, gradients(params, 1), StableSPAM(params)).statistics.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1}, "lr must be a number >= 0, got -1"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] must be in \[0, 1\), got 1.0"),
        ({"eps": -1e-6}, "eps must be a number >= 0"),
        ({"weight_decay": -0.1}, "weight_decay must be a number >= 0"),
        ({"threshold": 0}, "threshold must be a number > 0, got 0; None switches clipping off"),
        ({"threshold": -5}, "threshold must be a number > 0, got -5; None"),
        ({"clip_delay": 1.5}, "clip_delay must be a whole number >= 0, got 1.5"),
        ({"reset_interval": 0}, "reset_interval must be a whole number of steps >= 1, got 0; None switches resets"),
        ({"warmup_steps": -1}, "warmup_steps must be a whole number >= 0, got -1"),
        ({"density": 0}, r"density must be in \(0, 1\], got 0; 1.0 trains every entry"),
        ({"density": 1.5}, r"density must be in \(0, 1\], got 1.5"),
        ({"density": "half"}, r"density must be in \(0, 1\], got 'half'"),
        ({"seed": -1}, "seed must be a whole number >= 0, got -1"),
        ({"maximize": 1}, "maximize must be True or False, got 1"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        SPAM(parameters((3, 2)), **options)
    with pytest.raises(ValueError, match=message):
        SPAM([{"params": parameters((3, 2)), **options}])


def test_bad_parameters_gradients_and_states():
    with pytest.raises(ValueError, match=r"parameters must be real, got torch\.complex64 for shape \(2,\)"):
        SPAM([torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    with pytest.raises(TypeError, match=r"unknown option 'densty' in a parameter group \(did you mean 'density'\?\)"):
        SPAM([{"params": parameters((3, 2)), "densty": 0.5}])
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"dense, got torch\.sparse_coo for a parameter of shape \(4, 2\)"):
        SPAM(embedding.parameters()).step()
    params = parameters((3, 2))
    adamw = train(params, gradients(params, 1), torch.optim.AdamW(params))
    with pytest.raises(ValueError, match=r"parameter 0 must hold resets of shape \(\), got none; it was saved by"):
        SPAM(params).load_state_dict(adamw.state_dict())
