"""What the tests of the optimizer share: the paths, one tolerance table, and a run from gradients to weights."""

import torch

from hf_stablespam.optim import StableSPAM

PATHS = {
    "loop": {"foreach": False, "fused": False},
    "torch": {"foreach": True},
    "numba": {"fused": True},
}

# Against the float64 reference: (rtol, atol) on weights of size one after some steps of size lr <= 1e-2.
TOLERANCE = {
    torch.float64: (0.0, 1e-10),
    torch.float32: (1e-5, 2e-6),
    torch.float16: (0.0, 2e-3),  # half a unit in the last place of a weight near 2 is 1e-3; steps do not cancel it
    torch.bfloat16: (0.0, 1.6e-2),
}


def parameters(*shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def gradients(params, steps, seed=1, spike_every=0):
    """For each step one gradient per parameter; every `spike_every`-th step multiplies one entry by 1000."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for step in range(steps):
        row = [torch.randn(p.shape, generator=generator) * 0.01 for p in params]
        if spike_every and step % spike_every == spike_every - 1:
            for grad in row:
                grad.view(-1)[0] *= 1000
        rows.append([grad.to(p.dtype) for grad, p in zip(row, params, strict=True)])
    return rows


def train(params, rows, optimizer=None, **options):
    """Step through the rows of gradients (None: no gradient) and return the optimizer."""
    optimizer = optimizer or StableSPAM(params, **options)
    for row in rows:
        for param, grad in zip(params, row, strict=True):
            param.grad = None if grad is None else grad.clone()
        optimizer.step()
    return optimizer


def snapshot(optimizer):
    """Copies of every weight and every state tensor, in order."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    weights = [{"weight": p.detach().clone()} for p in params]
    return [w | {k: v.clone() for k, v in optimizer.state[p].items()} for w, p in zip(weights, params, strict=True)]


def assert_identical(left, right):
    """Bit for bit, dtypes included; nan equals nan in the same place only."""
    assert len(left) == len(right)
    for index, (a, b) in enumerate(zip(left, right, strict=True)):
        assert a.keys() == b.keys(), index
        for name in a:
            assert a[name].dtype == b[name].dtype, (index, name)
            assert a[name].shape == b[name].shape, (index, name)
            assert torch.equal(a[name], b[name]), (index, name, (a[name] - b[name]).abs().max())
