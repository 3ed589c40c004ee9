"""Experts of a mixture come back from a checkpoint, which holds them in another form than the model."""

import pytest
import torch
import transformers

from hf_stablespam import SpikeRecorder
from tests.trainer.helpers import VOCABULARY, tiny_trainer

pytestmark = pytest.mark.skipif(
    int(transformers.__version__.partition(".")[0]) < 5, reason="transformers 4 saves experts as the model has them"
)
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}
MODELS = {
    "Qwen3Moe": {**SHAPE, "moe_intermediate_size": 24, "head_dim": 8, "num_experts": 4},
    "Mixtral": {**SHAPE, "num_local_experts": 4},
}


def mixture(name):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**MODELS[name])
    return getattr(transformers, f"{name}ForCausalLM")(config)


def run(tmp_path, name, resume=None, **options):
    trainer = tiny_trainer(tmp_path, model=mixture(name), **{"max_steps": 4, "save_steps": 2, **options})
    trainer.train(resume_from_checkpoint=resume)
    return dict(trainer.model.named_parameters())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "options", [{}, {"optim": "adamw_torch", "callbacks": [SpikeRecorder()]}], ids=["ours", "callback"]
)
def test_a_resumed_run_ends_with_the_weights_of_a_whole_one(tmp_path, name, options):
    whole = run(tmp_path, name, save_strategy="steps", **options)
    resumed = run(tmp_path / "resumed", name, resume=str(tmp_path / "checkpoint-2"), **options)
    assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == []


def test_the_best_model_is_loaded_whole(tmp_path):
    """The evaluation loss of this run is lowest at its second step."""
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "save_strategy": "steps"}
    trainer = tiny_trainer(tmp_path, model=mixture("Qwen3Moe"), max_steps=4, save_steps=2, **options)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    saved = dict(transformers.Qwen3MoeForCausalLM.from_pretrained(tmp_path / "checkpoint-2").named_parameters())
    assert [key for key, value in trainer.model.named_parameters() if not torch.equal(saved[key], value)] == []


def test_a_run_with_nothing_of_ours_is_left_alone(tmp_path):
    """It loses its experts, as it does without this package."""
    whole = run(tmp_path, "Qwen3Moe", save_strategy="steps", optim="adamw_torch")
    resumed = run(tmp_path / "resumed", "Qwen3Moe", resume=str(tmp_path / "checkpoint-2"), optim="adamw_torch")
    assert [key for key in whole if not torch.equal(whole[key], resumed[key])] != []
