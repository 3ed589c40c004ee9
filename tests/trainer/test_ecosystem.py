"""Other models, other Trainers, other tasks: one small run each, with the optimizer, 4 bits and the callbacks."""

import evaluate
import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    ViTConfig,
    ViTForImageClassification,
)

from hf_stablespam import FourBitCallback, FourBitLinear, GradientNormCallback, MomentumResetCallback, StableSPAM
from tests.trainer.helpers import RandomTokens, arguments, optimizer_of, tiny_llama, training_logs

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def callbacks():
    return [FourBitCallback(), GradientNormCallback(), MomentumResetCallback(every=2)]


def train_and_check(trainer):
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert isinstance(optimizer_of(trainer), StableSPAM)
    assert any(isinstance(module, FourBitLinear) for module in trainer.model.modules())
    rows = training_logs(trainer)
    assert all(row["gradients/norm"] > 0 for row in rows)
    assert [row["momentum/resets"] for row in rows] == [step % 2 for step in range(len(rows))]
    trained = [(name, p) for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert all(torch.isfinite(p).all() for _, p in trained)
    assert any(not torch.equal(p, before[name]) for name, p in trained)


def test_sequence_to_sequence(tmp_path):
    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)
    args = arguments(tmp_path).to_dict() | {"predict_with_generate": True, "generation_max_length": 4}
    wanted = {name: value for name, value in args.items() if name in Seq2SeqTrainingArguments.__dataclass_fields__}
    trainer = Seq2SeqTrainer(
        T5ForConditionalGeneration(config),
        Seq2SeqTrainingArguments(**{**wanted, "max_steps": 4}),
        train_dataset=RandomTokens(),
        eval_dataset=RandomTokens(rows=4),
        callbacks=callbacks(),
    )
    train_and_check(trainer)
    assert trainer.predict(RandomTokens(rows=4)).predictions.shape[0] == 4


def test_image_classification(tmp_path):
    model = ViTForImageClassification(ViTConfig(**SMALL, image_size=8, patch_size=4, num_labels=3))
    images = [{"pixel_values": torch.randn(3, 8, 8), "labels": i % 3} for i in range(16)]
    train_and_check(Trainer(model, arguments(tmp_path, max_steps=4), train_dataset=images, callbacks=callbacks()))


class Accuracy(evaluate.Metric):
    """The `evaluate` library's own interface, without a download from the hub."""

    def _info(self):
        features = Features({"predictions": Value("int32"), "references": Value("int32")})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references):
        return {"accuracy": float(np.mean(np.equal(predictions, references)))}


def test_sequence_classification_with_an_evaluate_metric(tmp_path):
    model = BertForSequenceClassification(BertConfig(**SMALL, vocab_size=64, num_labels=2))
    tokens = torch.randint(64, (32, 8))
    rows = Dataset.from_dict({"input_ids": tokens.tolist(), "labels": (tokens[:, 0] % 2).tolist()})
    metric = Accuracy(cache_dir=str(tmp_path / "cache"))

    def compute_metrics(prediction):
        return metric.compute(predictions=prediction.predictions.argmax(-1), references=prediction.label_ids)

    trainer = Trainer(
        model,
        arguments(tmp_path, max_steps=4),
        train_dataset=rows,
        eval_dataset=rows,
        compute_metrics=compute_metrics,
        callbacks=callbacks(),
    )
    train_and_check(trainer)
    assert 0 <= trainer.evaluate()["eval_accuracy"] <= 1


def test_hyperparameter_search_over_the_optimizer(tmp_path):
    pytest.importorskip("optuna", reason="the hyperparameter search needs optuna, which is not installed")
    built = []

    class Keep(GradientNormCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            super().on_train_begin(args, state, control, **kwargs)
            built.append((type(kwargs["optimizer"].optimizer), kwargs["optimizer"].param_groups[0]))

    trainer = Trainer(
        model_init=lambda: tiny_llama(),
        args=arguments(tmp_path, optim="adamw_torch", max_steps=2, eval_strategy="steps", eval_steps=2),
        train_dataset=RandomTokens(),
        eval_dataset=RandomTokens(rows=4),
        callbacks=[Keep(), FourBitCallback()],
    )
    choices = [("adamw_torch", None), ("stable_spam", "clip_beta=0.9"), ("stable_spam", "gamma3=0.8,total_T=9")]

    def space(trial):
        return {"optim": choices[trial.number][0], "optim_args": choices[trial.number][1]}

    trainer.hyperparameter_search(space, n_trials=3, direction="minimize", backend="optuna")
    assert [kind for kind, _ in built] == [torch.optim.AdamW, StableSPAM, StableSPAM]
    assert [group["clip_beta"] for _, group in built[1:]] == [0.9, 0.8]
    assert [group["decay_steps"] for _, group in built[1:]] == [2, 9]


def test_gradient_checkpointing_bfloat16_and_accumulation(tmp_path):
    trainer = Trainer(
        tiny_llama(),
        arguments(tmp_path, bf16=True, gradient_checkpointing=True, gradient_accumulation_steps=2, max_steps=4),
        train_dataset=RandomTokens(),
        callbacks=callbacks(),
    )
    train_and_check(trainer)
