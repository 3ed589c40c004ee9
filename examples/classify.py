"""Sequence classification in 4 bits with a metric of `evaluate`: from which package does this piece of code come?

    python examples/classify.py --output_dir runs/classify                                    # embedded data
    python examples/classify.py --output_dir runs/classify --model_name_or_path distilbert/distilbert-base-uncased \\
        --dataset_name stanfordnlp/imdb --metric accuracy

Embedded data: pieces of the larger packages of Python's standard library. With `--dataset_name` a data set of the hub
with columns `text` and `label`, and with `--metric` a metric of the hub.
"""

import sys
from collections import defaultdict
from dataclasses import dataclass, field

import evaluate
import numpy as np
from corpus import load_standard_library, standard_library_documents
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

from hf_stablespam import FourBitCallback, FourBitConfig, GradientNormCallback

PIECE = 400  # characters
LENGTH = 128  # tokens
PACKAGES = ("asyncio", "ctypes", "distutils", "email", "importlib", "multiprocessing", "tkinter", "unittest")


@dataclass
class ScriptArguments:
    model_name_or_path: str | None = field(default=None, metadata={"help": "Default: a small BERT, untrained."})
    dataset_name: str | None = field(default=None, metadata={"help": "Hub name, with columns `text` and `label`."})
    metric: str | None = field(default=None, metadata={"help": "Metric of the hub; default: accuracy, from here."})
    smoke: bool = field(default=False, metadata={"help": "A few steps, to see that it runs."})


class Accuracy(evaluate.Metric):
    """Accuracy without a download; `evaluate.load("accuracy")` gives the same."""

    def _info(self) -> evaluate.MetricInfo:
        features = Features({"predictions": Value("int32"), "references": Value("int32")})
        return evaluate.MetricInfo(description=self.__doc__, citation="", features=features)

    def _compute(self, predictions, references) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.equal(predictions, references)))}


def pieces_of_packages() -> DatasetDict:
    """Rows `text`, `label`, balanced over the packages that this Python has."""
    texts = defaultdict(list)
    for name, text in standard_library_documents():
        package = name.split("/")[0]
        if package in PACKAGES:
            texts[package] += [text[i : i + PIECE] for i in range(0, len(text), PIECE)]
    names = sorted(texts)
    count = min(map(len, texts.values()))
    rows = [(piece, label) for label, name in enumerate(names) for piece in texts[name][:count]]
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    table = Dataset.from_dict(dict(zip(("text", "label"), map(list, zip(*rows, strict=True)), strict=True)), features)
    return table.train_test_split(test_size=0.1, seed=0)


def main(command_line: list[str] | None = None) -> None:
    parser = HfArgumentParser((ScriptArguments, TrainingArguments))
    parser.set_defaults(
        optim="stable_spam", max_grad_norm=0.0, learning_rate=1e-3, max_steps=200, logging_steps=20, warmup_steps=20
    )
    script, args = parser.parse_args_into_dataclasses(command_line)
    if script.smoke:
        args.max_steps, args.logging_steps = 4, 2

    table = load_dataset(script.dataset_name) if script.dataset_name else pieces_of_packages()
    classes = table["train"].features["label"].names
    if script.model_name_or_path:
        tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
        model = AutoModelForSequenceClassification.from_pretrained(script.model_name_or_path, num_labels=len(classes))
    else:
        tokenizer = load_standard_library().tokenizer
        model = BertForSequenceClassification(small_bert(len(tokenizer), len(classes)))
    table = table.map(lambda row: tokenizer(row["text"], truncation=True, max_length=LENGTH), remove_columns=["text"])
    metric = evaluate.load(script.metric) if script.metric else Accuracy()

    def compute_metrics(prediction):
        return metric.compute(predictions=prediction.predictions.argmax(-1), references=prediction.label_ids)

    evaluation = table["test"].shuffle(seed=0)
    trainer = Trainer(
        model,
        args,
        train_dataset=table["train"],
        eval_dataset=evaluation.select(range(min(len(evaluation), 64 if script.smoke else 1000))),
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
        callbacks=[
            FourBitCallback(FourBitConfig(modules_to_not_convert=("classifier", "pooler"))),
            GradientNormCallback(),
        ],
    )
    trainer.train()
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)


def small_bert(vocab_size: int, num_labels: int) -> BertConfig:
    return BertConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=num_labels,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
