"""A mixture of experts under the Trainer: 4 bits, resume, export, `torch.compile`, and figures of its experts."""

import pytest
import torch
import transformers
from packaging.version import Version
from torch._dynamo.utils import counters

from hf_stablespam import FourBitCallback, FourBitConfig, GradientNormCallback, convert_to_4bit, export_4bit
from tests.quant.layers.mixtures import FORMATS, TOKENS, TRAINED, experts_of, mixture, need_shared_form
from tests.trainer.helpers import tiny_trainer, training_logs

need_shared_form()


def trainer_of(folder, model, name, by=None, **options):
    callbacks = [FourBitCallback(FORMATS[name]), GradientNormCallback(by=by)]
    return tiny_trainer(folder, model=model, callbacks=callbacks, **{"max_steps": 4, **options})


@pytest.mark.parametrize(("family", "name"), TRAINED)
def test_training_resumes_exactly_and_comes_out_with_equal_logits(tmp_path, family, name):
    """In bfloat16 and with gradient checkpointing."""

    def run(folder, resume=None, **options):
        model = mixture(family)
        for parameter in model.parameters():  # not the rotary buffers, which a loaded model has in float32
            parameter.data = parameter.data.bfloat16()
        trainer = trainer_of(folder, model, name, gradient_checkpointing=True, **options)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    straight = run(tmp_path / "straight", save_strategy="steps", save_steps=2)
    resumed = run(tmp_path / "resumed", resume=str(tmp_path / "straight" / "checkpoint-2"))
    pairs = zip(straight.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    logs = [training_logs(trainer)[-1] for trainer in (straight, resumed)]
    names = [key for key in logs[0] if key.startswith(("gradients/", "experts/"))]
    assert names
    assert [logs[0][key] for key in names] == [logs[1][key] for key in names]
    pytest.importorskip("compressed_tensors", reason="export needs it; install the extra 'export'")
    from tests.quant.export.test_experts import reloaded_logits, weight_only

    export_4bit(straight.model, tmp_path / "4bit")
    assert torch.equal(reloaded_logits(tmp_path / "4bit"), weight_only(straight.model.eval())(TOKENS).logits)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.24"),
    reason="grouped_mm in float32 compiles in transformers 5.24, not in 5.0.0 and 5.12.0; between is unknown",
)
@pytest.mark.parametrize(("family", "name"), TRAINED)
def test_a_compiled_model_trains_alike_and_is_one_graph(tmp_path, family, name):
    plain = trainer_of(tmp_path, mixture(family), name, max_steps=2)
    plain.train()
    torch._dynamo.reset()
    counters.clear()
    # The rounding is traced in all, and its gradient in one of each: it takes as long again.
    backend = "aot_eager" if (family, name) in TRAINED[::3] else "eager"
    how = {"torch_compile": True, "torch_compile_backend": backend}
    compiled = trainer_of(tmp_path, mixture(family), name, max_steps=2, **how)
    compiled.train()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    pairs = zip(plain.model.parameters(), compiled.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_figures_of_the_experts(tmp_path):
    trainer = trainer_of(tmp_path, mixture(), "int4", by="block", logging_steps=2)
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


def test_a_callback_without_a_configuration_takes_that_of_the_experts(tmp_path):
    own = FourBitConfig("mxfp4", None, target_modules=("experts",))
    model = convert_to_4bit(mixture("gpt_oss"), own)
    callback = FourBitCallback()
    tiny_trainer(tmp_path, model=model, callbacks=[callback])
    assert callback.config == own
