import re

import galore_pretrain
import pytest


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "data.txt"
    path.write_text("".join(f"line {i}: {i} times {i + 1} is {i * (i + 1)}, and that is it\n" for i in range(2000)))
    return str(path)


@pytest.mark.parametrize(
    ("options", "least"),
    [([], 0.25), (["--rank", "8", "--layerwise", "--state_bits", "8"], 0.6)],
    ids=["plain", "small and layer-wise"],
)
def test_it_trains_and_reports_less_memory_than_adamw(tmp_path, text, capsys, options, least):
    if "--state_bits" in options:
        pytest.importorskip("torchao.optim", reason="low-bit states are torchao's (extra lowbit)")
    galore_pretrain.main(["--smoke", "--dataset_name", text, "--output_dir", str(tmp_path / "out"), *options])
    shown = capsys.readouterr().out
    assert 0 < float(re.search(r"in INT4: (\d+\.\d+)", shown)[1]) < 10
    assert float(re.search(r"bytes, (\d+\.\d)% below AdamW", shown)[1]) / 100 > least
