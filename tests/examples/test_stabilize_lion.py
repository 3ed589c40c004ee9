import math
import re

import pytest
import stabilize_lion
import torch


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "data.txt"
    path.write_text("".join(f"line {i}: {i} times {i + 1} is {i * (i + 1)}, and that is it\n" for i in range(2000)))
    return str(path)


def test_both_runs_train_and_are_reported(tmp_path, text, capsys):
    stabilize_lion.main(
        ["--smoke", "--learning_rate", "1e-2", "--dataset_name", text, "--output_dir", str(tmp_path / "out")]
    )
    shown = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"Lion \+ \w+ +(\d\.\d+)", shown)]
    assert len(losses) == 2
    assert losses[0] != losses[1]
    assert all(math.isfinite(loss) for loss in losses)


def test_lion_steps_by_the_sign():
    weight = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    optimizer = stabilize_lion.Lion([weight], lr=0.1, betas=(0.9, 0.5))
    for grad in ([1.0, -1.0], [-5.0, 1.0]):  # 0.9·0.5·(±1) + 0.1·grad: the momentum wins in the second entry only
        weight.grad = torch.tensor(grad)
        optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([1.0, 1.2]))
