"""Names of parts and figures."""

import math
import re
from pathlib import Path

import pytest
import torch

from hf_stablespam.monitor.figures import FIGURES, Parts, block_of, label, sqnr_db


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("model.layers.10.self_attn.q_proj.weight", "model.layers.10"),
        ("model.layers.1.mlp.experts.3.down_proj.weight", "model.layers.1"),
        ("transformer.h.0.ln_1.bias", "transformer.h.0"),
        ("encoder.block.2.layer.0.SelfAttention.q.weight", "encoder.block.2"),
        ("0.weight", "0"),
        ("conv1.weight", "conv1"),
        ("lm_head.weight", "lm_head"),
        ("scale", "scale"),
    ],
)
def test_block_of_a_parameter(name, block):
    assert block_of(name) == block


def test_parts_count_their_entries():
    names = ["layers.0.a", "layers.1.a", "layers.0.b"]
    parts = Parts(names, [5, 7, 11], "block", torch.device("cpu"))
    assert dict(zip(parts.names, parts.entries, strict=True)) == {"": 23, "layers.0": 16, "layers.1": 7}
    assert Parts(names, [5, 7, 11], None, torch.device("cpu")).names == [""]


def test_no_two_figures_share_a_name():
    names = [label(figure, kind, "") for figure, how in FIGURES.items() for kind in how.whole]
    assert len(set(names)) == len(names)


def test_sqnr_of_nothing_or_without_noise_is_not_reported():
    assert sqnr_db([], [], "block") == {}
    assert sqnr_db(["a.0.w", "a.1.w"], [4.0, 0.0, math.nan, 1.0], "block") == {}
    assert sqnr_db(["a.0.w", "a.1.w"], [4.0, 0.0, 6.0, 1.0], "block") == {
        "weight_sqnr_db": pytest.approx(10.0),
        "weight_sqnr_db/a.1": pytest.approx(7.7815, rel=1e-4),
    }


def test_the_documentation_names_every_figure():
    text = (Path(__file__).parents[2] / "docs" / "monitoring.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|([^|]*)\|.*\|$", text.split("## Spike scores")[0], re.MULTILINE)
    documented = {name + kind for name, kinds in rows for kind in ("", *re.findall(r"`(\w+)`", kinds))}
    wholes = {label(figure, kind, "") for figure, how in FIGURES.items() for kind in how.whole}
    assert documented == wholes | {"weight_sqnr_db"}
    parts = {label(figure, kind, "") for figure, how in FIGURES.items() for kind in how.part}
    listed = text.split("`gradients/norm_max/model.layers.3`:")[1].split("A tensor has")[0]
    assert set(re.findall(r"`(\w+)`", listed)) == parts | {"weight_sqnr_db"}
