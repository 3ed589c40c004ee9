"""TRL's trainers and its command line, with the optimizer, 4 bits and the callbacks."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from hf_stablespam import (
    FourBitCallback,
    FourBitConfig,
    FourBitLinear,
    GradientNormCallback,
    MomentumResetCallback,
    StableSPAM,
    convert_to_4bit,
)
from hf_stablespam.quant.layers.experts import FourBitExperts
from tests.processes import run_module
from tests.quant.layers.mixtures import FORMATS, TOKENS, TRAINED, experts_of, mixture
from tests.trainer.helpers import optimizer_of, tiny_llama, training_logs

trl = pytest.importorskip("trl", reason="trl is not installed: it is tested by `make test-versions`")

WORDS = [f"w{i}" for i in range(60)]


def tokenizer():
    words = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    fast.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    return fast


def sentence(start, length=6):
    return " ".join(WORDS[(start + i) % len(WORDS)] for i in range(length))


def options(output_dir, **more):
    return {
        "output_dir": str(output_dir),
        "optim": "stable_spam",
        "max_grad_norm": 0.0,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        **more,
    }


def base_model(folder):
    """From a folder, because DPO reads its reference model from where the model came from."""
    tiny_llama(pad_token_id=0, bos_token_id=1, eos_token_id=1, max_position_embeddings=64).save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder)


def build(kind, tmp_path, **more):
    common = {
        "model": base_model(tmp_path / "base"),
        "processing_class": tokenizer(),
        "callbacks": [FourBitCallback(), GradientNormCallback(), MomentumResetCallback(every=2)],
        **more,
    }
    if kind == "sft":
        rows = Dataset.from_dict({"text": [sentence(i) for i in range(16)]})
        return trl.SFTTrainer(args=trl.SFTConfig(**options(tmp_path)), train_dataset=rows, **common)
    if kind == "dpo":
        names = ("prompt", "chosen", "rejected")
        rows = Dataset.from_dict({name: [sentence(i * k + k) for i in range(16)] for k, name in enumerate(names)})
        return trl.DPOTrainer(args=trl.DPOConfig(**options(tmp_path)), train_dataset=rows, **common)
    rows = Dataset.from_dict({"prompt": [sentence(i) for i in range(16)]})
    args = trl.GRPOConfig(**options(tmp_path, num_generations=4, max_completion_length=8))
    return trl.GRPOTrainer(args=args, train_dataset=rows, reward_funcs=count_words, **common)


def count_words(completions, **kwargs):
    return [float(len(set(text.split()))) for text in completions]


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo"])
def test_trains(tmp_path, kind, adapter):
    more = {"peft_config": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")} if adapter else {}
    trainer = build(kind, tmp_path, **more)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert isinstance(optimizer_of(trainer), StableSPAM)
    assert any(isinstance(module, FourBitLinear) for module in trainer.model.modules())
    named = dict(trainer.model.named_parameters())
    assert any(not torch.equal(named[name], weight) for name, weight in before.items())
    assert all(torch.isfinite(named[name]).all() for name in before)
    rows = training_logs(trainer)
    assert [row["momentum/resets"] for row in rows] == [0, 1, 0, 1]
    assert all("gradients/norm" in row for row in rows)


@pytest.mark.parametrize(("family", "name"), TRAINED)
def test_sft_of_a_mixture(tmp_path, family, name):
    rows = Dataset.from_dict({"text": [sentence(i) for i in range(16)]})
    args = trl.SFTConfig(**options(tmp_path, max_steps=2))
    common = {"processing_class": tokenizer(), "callbacks": [FourBitCallback(FORMATS[name])]}
    trainer = trl.SFTTrainer(mixture(family), args=args, train_dataset=rows, **common)
    experts = experts_of(trainer.model)
    before = experts.down_proj.detach().clone()
    trainer.train()
    assert isinstance(experts, FourBitExperts)
    assert isinstance(optimizer_of(trainer), StableSPAM)
    assert experts.down_proj.isfinite().all()
    assert all(not torch.equal(*pair) for pair in zip(before, experts.down_proj, strict=True)), "an expert stood still"


@pytest.mark.parametrize(("family", "name"), TRAINED)
def test_sft_of_a_mixture_with_adapters_on_its_experts(tmp_path, family, name):
    """With gradient checkpointing; the merged experts are those of training, and the run resumes exactly."""
    experts = ["experts.gate_up_proj", "experts.down_proj"]
    rows = Dataset.from_dict({"text": [sentence(i) for i in range(16)]})

    def trainer_of(folder, **more):
        args = trl.SFTConfig(**options(folder, gradient_checkpointing=True, **more))
        lora = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=experts, task_type="CAUSAL_LM")
        common = {
            "processing_class": tokenizer(),
            "callbacks": [FourBitCallback(replace(FORMATS[name], adapters="merged"))],
        }
        return trl.SFTTrainer(mixture(family), args=args, train_dataset=rows, peft_config=lora, **common)

    straight = trainer_of(tmp_path / "straight", save_strategy="steps", save_steps=2)
    straight.train()
    resumed = trainer_of(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    trained = {name: p.detach() for name, p in straight.model.named_parameters() if p.requires_grad}
    again = dict(resumed.model.named_parameters())
    assert any("experts" in name and "lora_B" in name and p.count_nonzero() for name, p in trained.items())
    assert all(torch.equal(p, again[name]) for name, p in trained.items())
    logits = straight.model.eval()(TOKENS).logits
    merged = straight.model.merge_and_unload()
    assert any(isinstance(module, FourBitExperts) for module in merged.modules())
    torch.testing.assert_close(merged(TOKENS).logits, logits, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_the_command_line_under_the_launcher(tmp_path, monkeypatch):
    """`trl sft` parses its arguments in the parent and again in a child that `accelerate launch` starts."""
    base_model(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "data").mkdir()
    rows = [json.dumps({"text": sentence(i)}) for i in range(16)]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(rows))
    flags = options(tmp_path / "out", model_name_or_path=tmp_path / "base", dataset_name=tmp_path / "data")
    flags |= {"report_to": "none", "save_strategy": "steps"}
    command = [Path(sys.executable).parent / "trl", "sft"]
    command += [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    run_module("hf_stablespam", "--gradient-norms", "--four-bit", "int4", *command)
    state = json.loads((tmp_path / "out" / "checkpoint-4" / "trainer_state.json").read_text())
    assert all(row["gradients/clipped"] >= 0 for row in state["log_history"] if "loss" in row)


def test_a_reference_model_that_is_synchronized_computes_with_its_new_weights():
    """TRL writes to ``param.data``."""
    policy, reference = (convert_to_4bit(tiny_llama()) for _ in range(2))
    tokens = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.5)
        before = reference.requires_grad_(False)(tokens).logits
        trl.trainer.callbacks.SyncRefModelCallback._sync_target_model(policy, reference, alpha=1.0)
        assert torch.equal(reference(tokens).logits, policy(tokens).logits)
        assert not torch.equal(reference(tokens).logits, before)


def preferences(trainer_class, tmp_path, **more):
    names = ("prompt", "chosen", "rejected")
    rows = Dataset.from_dict({name: [sentence(i * k + k) for i in range(16)] for k, name in enumerate(names)})
    config = trl.DPOConfig if trainer_class is trl.DPOTrainer else trl.KTOConfig
    if trainer_class is trl.KTOTrainer:
        half = rows.remove_columns("rejected").rename_column("chosen", "completion")
        rows = half.add_column("label", [True, False] * 8)
    args = config(**options(tmp_path, learning_rate=0.0, **more.pop("config", {})))
    data = {"train_dataset": rows, "eval_dataset": rows, "processing_class": tokenizer()}
    model, callbacks = more.pop("model", None) or base_model(tmp_path / "base"), [FourBitCallback()]
    return trainer_class(model, args=args, **{**data, "callbacks": callbacks, **more})


@pytest.mark.parametrize("given", [False, True])
def test_the_reference_of_dpo_is_converted_as_the_policy_is(tmp_path, given):
    more = {"ref_model": base_model(tmp_path / "base")} if given else {}
    trainer = preferences(trl.DPOTrainer, tmp_path, **more)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    trainer.train()
    losses = [row["loss"] for row in training_logs(trainer)]
    assert losses == pytest.approx([math.log(2)] * 4, abs=1e-5)
    assert any(isinstance(module, FourBitLinear) for module in trainer.ref_model.modules())


@pytest.mark.parametrize("by", ["evaluate", "predict"])
def test_the_reference_of_a_policy_that_was_loaded_in_4_bits(tmp_path, by):
    base_model(tmp_path / "base")
    policy = LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=FourBitConfig())
    trainer = preferences(trl.DPOTrainer, tmp_path, model=policy, callbacks=[])
    if by == "evaluate":
        loss = trainer.evaluate()["eval_loss"]
    else:
        loss = trainer.predict(trainer.eval_dataset).metrics["test_loss"]
    assert loss == pytest.approx(math.log(2), abs=1e-6)
    assert any(isinstance(module, FourBitLinear) for module in trainer.ref_model.modules())


def test_the_reference_of_kto_is_converted_too(tmp_path):
    trainer = preferences(trl.KTOTrainer, tmp_path)
    trainer.train()
    assert [row["loss"] for row in training_logs(trainer)] == pytest.approx([0.5] * 4, abs=1e-5)


def test_the_reference_of_grpo_is_converted_too(tmp_path):
    rows = Dataset.from_dict({"prompt": [sentence(i) for i in range(16)]})
    args = trl.GRPOConfig(**options(tmp_path, num_generations=4, max_completion_length=4, beta=0.1, learning_rate=0.0))
    common = {"processing_class": tokenizer(), "callbacks": [FourBitCallback()]}
    trainer = trl.GRPOTrainer(
        base_model(tmp_path / "base"), args=args, train_dataset=rows, reward_funcs=count_words, **common
    )
    trainer.train()
    assert [row["kl"] for row in training_logs(trainer)] == pytest.approx([0.0] * 4, abs=1e-6)


def test_log_probabilities_of_a_reference_in_high_precision_are_refused(tmp_path):
    more = {"config": {"precompute_ref_log_probs": True}, "ref_model": base_model(tmp_path / "base")}
    trainer = preferences(trl.DPOTrainer, tmp_path, **more)
    with pytest.raises(ValueError, match=r"ref_model must be in 4 bits as the model is.*ref_model=convert_to_4bit"):
        trainer.train()
