"""A mixture of experts under the Trainer: 4 bits, resume, and figures of its experts."""

import pytest
import torch

from hf_stablespam import FourBitCallback, FourBitConfig, GradientNormCallback
from tests.trainer.helpers import tiny_trainer, training_logs

pytest.importorskip("transformers", minversion="5.0", reason="before transformers 5 experts are lists of nn.Linear")
from tests.quant.layers.test_experts import experts_of, mixture

FORMATS = {"int4": FourBitConfig(group_size=32), "mxfp4": FourBitConfig(weight="mxfp4", activation="mxfp4")}


def trainer_of(folder, family, name, by=None, **options):
    callbacks = [FourBitCallback(FORMATS[name]), GradientNormCallback(by=by)]
    return tiny_trainer(folder, model=mixture(family), callbacks=callbacks, **{"max_steps": 4, **options})


@pytest.mark.parametrize(("family", "name"), [("qwen3_moe", "int4"), ("gpt_oss", "mxfp4")])
def test_training_resumes_exactly(tmp_path, family, name):
    straight = trainer_of(tmp_path / "straight", family, name, save_strategy="steps", save_steps=2)
    straight.train()
    resumed = trainer_of(tmp_path / "resumed", family, name)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    pairs = zip(straight.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    logs = [training_logs(trainer)[-1] for trainer in (straight, resumed)]
    names = [key for key in logs[0] if key.startswith(("gradients/", "experts/"))]
    assert names
    assert [logs[0][key] for key in names] == [logs[1][key] for key in names]


def test_figures_of_the_experts(tmp_path):
    trainer = trainer_of(tmp_path, "qwen3_moe", "int4", by="block", logging_steps=2)
    counts = torch.zeros(4)

    def count(module, args):
        if module.training:
            counts.add_(torch.bincount(args[1].reshape(-1), minlength=4))

    experts_of(trainer.model).register_forward_pre_hook(count)
    trainer.train()
    first, last = training_logs(trainer)
    for row in (first, last):
        assert row["experts/load_max"] == row["experts/load_max/model.layers.0"]
        assert row["experts/unused"] == row["experts/unused/model.layers.0"] <= 2
        assert 5 < row["gradients/weight_sqnr_db"] < 40
    # Two logs of as many tokens: the load of both is between theirs.
    together = float(counts.max() * 4 / counts.sum())
    assert min(first["experts/load_max"], last["experts/load_max"]) - 1e-6 <= together + 1e-6
    assert together <= max(first["experts/load_max"], last["experts/load_max"]) + 1e-6
    assert len(experts_of(trainer.model)._forward_pre_hooks) == 1, "nothing of the callback stays behind"


def test_a_model_without_experts_has_no_such_figures(tmp_path):
    trainer = tiny_trainer(tmp_path, callbacks=[GradientNormCallback()], max_steps=1)
    trainer.train()
    assert not [key for key in training_logs(trainer)[0] if key.startswith("experts/")]
