import json

import injected_spikes
import pytest
import torch


def test_the_spikes_are_injected_before_clipping_and_seen(tmp_path, capsys):
    injected_spikes.main(["--smoke", "--output_dir", str(tmp_path)])
    assert "report.html" in capsys.readouterr().out
    assert (tmp_path / "report.html").is_file()
    for name in injected_spikes.OPTIMIZERS:
        rows = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        norms = {row["step"]: row["gradients/norm"] for row in rows if "gradients/norm" in row}
        assert norms[2] > 10
        assert norms[4] > 10
        blocks = {key: row[key] for row in rows for key in row if key.startswith("gradients/norm_max/")}
        assert max(blocks, key=blocks.get) == "gradients/norm_max/model.layers.1"


@pytest.mark.parametrize("due", [False, True])
def test_a_spike_is_as_large_as_asked_for(due):
    injector = injected_spikes.SpikeInjector(every=2, size=100.0)
    injector.now = due
    gradient = torch.full((50, 40), -0.5)
    spiked = injector.spiked(gradient)
    assert (spiked == 50.0).sum() == (2 if due else 0)
    assert (spiked == -0.5).sum() == (1998 if due else 2000)
