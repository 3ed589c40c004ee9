"""The table of docs/combinations.md: every cell works, or is refused by name."""

import inspect
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from hf_stablespam.optim import SPAM, LayerwiseStableSPAM, StableSPAM, stabilize

PAGE = Path(__file__).parents[2] / "docs" / "combinations.md"
OPTIONS = {
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "state_dtype": {"state_dtype": torch.bfloat16},
    "state_bits": {"state_bits": 8},
    "rank": {"rank": 8},
    "sharded": {},
    "layerwise": {},
}
SPOKEN = {"sharded": "sharded", "layerwise": "Layerwise"}  # what the error calls it, where not by its own name


def table():
    """(row, column) → what the page says."""
    rows = [line.strip("|").split("|") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    head = [cell.strip() for cell in rows[0][1:]]
    cells = {}
    for name, *row in rows[1 : len(head) + 1]:
        for column, cell in zip(head, row, strict=True):
            cells[name.strip(" *"), column] = cell.strip()
    return cells


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def sharded_weight(mesh):
    return nn.Parameter(distribute_tensor(torch.randn(64, 128), mesh, [Shard(0)]))


def train(features, mesh):
    """Two steps with the features switched on; whether the weights moved and stayed finite."""
    options = {name: value for feature in features for name, value in OPTIONS[feature].items()}
    weight = sharded_weight(mesh) if "sharded" in features else nn.Parameter(torch.randn(64, 128))
    before = weight.detach().clone()
    optimizer = (LayerwiseStableSPAM if "layerwise" in features else StableSPAM)([weight], lr=1e-2, **options)
    for _ in range(2):
        (weight * weight).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = weight.detach() - before
    moved = moved.full_tensor() if "sharded" in features else moved
    assert moved.isfinite().all()
    assert (moved != 0).all()


@pytest.mark.parametrize("row", OPTIONS)
@pytest.mark.parametrize("column", OPTIONS)
def test_every_cell(row, column, mesh):
    if "state_bits" in (row, column):
        pytest.importorskip("torchao.optim", reason="low-bit states are torchao's (extra lowbit)")
    cell = table()[row, column]
    assert cell == table()[column, row]
    if cell == "works":
        train({row, column}, mesh)
        return
    assert cell == "refused"
    with pytest.raises(ValueError, match=SPOKEN.get(row, row)) as caught:
        train({row, column}, mesh)
    assert SPOKEN.get(column, column) in str(caught.value)


def test_spam_and_stabilize_refuse_sharded_parameters(mesh):
    weight = sharded_weight(mesh)
    (weight * weight).sum().backward()
    with pytest.raises(ValueError, match=r"SPAM needs whole parameters, got a sharded one .* \(64, 128\)"):
        SPAM([weight]).step()
    with pytest.raises(ValueError, match=r"stabilize needs whole parameters, got a sharded one .* \(64, 128\)"):
        stabilize(torch.optim.SGD([weight], lr=0.1)).step()


def test_spam_takes_none_of_the_others():
    of_spam, of_stable_spam = (set(inspect.signature(cls).parameters) for cls in (SPAM, StableSPAM))
    assert "density" in of_spam - of_stable_spam
    assert not {name for options in OPTIONS.values() for name in options} & of_spam


def test_the_figures_of_the_page_are_those_of_the_script(capsys):
    from benchmarks import optimizer_memory

    optimizer_memory.main(["--dry-run"])
    shown = capsys.readouterr().out
    shares = re.findall(r"^  (.+?) +[\d.]+ GB +([\d.]+) B/parameter +([+-][\d.]+) %$", shown, flags=re.M)
    page = PAGE.read_text()
    for name, _, share in shares:
        if float(share) < -1:
            assert share.replace("-", "−") + " %" in page, name
    by_size = [dict((name, float(share)) for name, _, share in shares[start : start + 10]) for start in (30, 40)]
    for size in by_size:  # 1B and 7B
        assert size["StableSPAM rank=hidden/4"] < -60
        assert size["StableSPAM rank=hidden/4 state_bits=8"] < -80
