import re

import prune_and_recover
import pytest
import torch

from hf_stablespam.recipes.adapt_pruner import load_pruned


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "data.txt"
    path.write_text("".join(f"line {i}: {i} times {i + 1} is {i * (i + 1)}, and that is it\n" for i in range(2000)))
    return str(path)


@pytest.mark.parametrize("more", [[], ["--stages", "2", "--four_bit"]], ids=["one cut", "two in 4 bits"])
def test_the_comparison(tmp_path, text, capsys, more):
    out = tmp_path / "out"
    prune_and_recover.main(["--smoke", "--target", "0.85", "--dataset_name", text, "--output_dir", str(out), *more])
    shown = capsys.readouterr().out
    rows = re.findall(r"^(dense|uniform|adaptive|from scratch) +([\d,]+) .*?(\d\.\d+)  ?([\d ]*)$", shown, re.MULTILINE)
    assert [name for name, *_ in rows] == ["dense", "uniform", "adaptive", "from scratch"]
    whole, *others = (int(count.replace(",", "")) for _, count, *_ in rows)
    assert all(0.7 * whole < count <= 0.85 * whole for count in others)
    assert (out / "prune_and_recover.png").read_bytes().startswith(b"\x89PNG")
    model = load_pruned(out / "adaptive", dtype=torch.float32)
    assert sum(parameter.numel() for parameter in model.parameters()) == others[1]
