"""One pretraining of the quality benchmark: what is trained, on what, and what is measured."""

from __future__ import annotations

import math
import statistics
import sys
import sysconfig
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[1]))

from corpus import Corpus, TokenBlocks, evenly_spaced, load_documents, standard_library_documents
from pretrain import DataArguments, ModelArguments, llama, load_data
from torch.utils.data import Dataset
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from benchmarks._record import synchronize
from benchmarks.quality_methods import METHODS, PRECISIONS
from hf_stablespam import FourBitCallback, LearningRateScaleCallback, StabilizeCallback

EVALUATIONS = 20  # along each run, on a few blocks: how fast the loss falls
CURVE_BLOCKS, FINAL_BLOCKS = 64, 256
HEADERS = ("c10", "torch", "pybind11", "google", "fmt")  # folders of torch/include
TIED = "-tied"  # at the end of a size: one matrix is embedding and head
STANDARD_LIBRARY, TORCH_HEADERS, INSTALLED_SOURCES = "standard_library", "torch_headers", "installed_sources"


class StepTimes(TrainerCallback):
    """Seconds of each update step, evaluations left out."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        synchronize()
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        synchronize()
        self.seconds.append(time.perf_counter() - self.start)


@dataclass(frozen=True)
class Run:
    """What sets one training apart from the others; two equal runs are the same row of the record."""

    method: str
    precision: str
    learning_rate: float
    seed: int = 42
    steps: int = 500
    data: str = STANDARD_LIBRARY
    model_size: str = "tiny"
    batch_size: int = 16
    block_size: int = 128
    bf16: bool = False

    @classmethod
    def from_row(cls, row: dict[str, str]) -> Run:
        """The run that a row of the CSV describes."""
        types = {"learning_rate": float, "bf16": lambda text: text == "True"}
        types |= dict.fromkeys(("seed", "steps", "batch_size", "block_size"), int)
        return cls(**{each.name: types.get(each.name, str)(row[each.name]) for each in fields(cls)})

    def train(self) -> dict[str, Any]:
        """Pretrain from the seed; the columns of the CSV that describe run and outcome."""
        method, formats = METHODS[self.method], PRECISIONS[self.precision]
        size = self.model_size.removesuffix(TIED)
        train, validation, tokenizer = data_for(self.data, size, self.block_size)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        set_seed(self.seed)
        model: Any = llama(size, tokenizer, self.block_size)
        if self.model_size.endswith(TIED):
            model.lm_head.weight = model.model.embed_tokens.weight
        times = StepTimes()
        callbacks: list[TrainerCallback] = [times] if formats is None else [times, FourBitCallback(formats)]
        if method.stabilized:
            callbacks.append(StabilizeCallback())
        if method.scales:
            callbacks.append(LearningRateScaleCallback(**method.scales))
        with TemporaryDirectory() as folder:
            trainer = Trainer(
                model,
                self.arguments(folder),
                train_dataset=train,
                eval_dataset=evenly_spaced(validation, CURVE_BLOCKS),
                data_collator=default_data_collator,
                callbacks=callbacks,
                optimizers=(method.optimizer(model, self.learning_rate, self.steps), None),
            )
            trainer.remove_callback(PrinterCallback)  # the queue prints one line for each run
            trainer.train()
            curve = [(row["step"], row["eval_loss"]) for row in trainer.state.log_history if "eval_loss" in row]
            loss = trainer.evaluate(evenly_spaced(validation, FINAL_BLOCKS))["eval_loss"]
        seconds = statistics.median(times.seconds)
        return asdict(self) | {
            "eval_loss": round(loss, 5),
            "perplexity": round(math.exp(loss), 3) if loss < 700 else math.inf,
            "survived": math.isfinite(loss),
            "seconds_per_step": round(seconds, 4),
            "tokens_per_second": round(self.batch_size * self.block_size / seconds),
            "peak_memory_mib": round(torch.cuda.max_memory_allocated() / 2**20) if torch.cuda.is_available() else "",
            "curve": " ".join(f"{step}:{value:.4f}" for step, value in curve),
        }

    def arguments(self, folder: str) -> TrainingArguments:
        """Equal for all runs but for the optimizer, the learning rate and the seed."""
        method = METHODS[self.method]
        schedule: dict[str, Any] = {"lr_scheduler_type": "cosine_with_min_lr"}
        schedule["lr_scheduler_kwargs"] = {"min_lr_rate": 0.1}
        if method.stable:
            schedule["lr_scheduler_type"] = "warmup_stable_decay"
            schedule["lr_scheduler_kwargs"] = {"num_decay_steps": max(1, self.steps // 5), "min_lr_ratio": 0.1}
        return TrainingArguments(
            folder,
            optim=method.optim,
            optim_args=method.optim_args,
            optim_target_modules=method.targets,
            learning_rate=self.learning_rate,
            max_grad_norm=method.clip,
            max_steps=self.steps,
            per_device_train_batch_size=self.batch_size,
            per_device_eval_batch_size=2 * self.batch_size,
            warmup_steps=max(1, self.steps // 10),
            seed=self.seed,
            bf16=self.bf16,
            eval_strategy="steps",
            eval_steps=max(1, self.steps // EVALUATIONS),
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            **schedule,
            **method.arguments,
        )


@lru_cache(maxsize=2)
def data_for(name: str, model_size: str, block_size: int) -> tuple[Dataset, Dataset, Any]:
    """Training blocks, validation blocks and tokenizer of one of the texts found on every machine, or a data set."""
    model = ModelArguments(model_size=model_size)
    if name in FOUND_TEXTS:
        corpus = FOUND_TEXTS[name](model.vocab_size)
        train, validation = (TokenBlocks(tokens, block_size) for tokens in (corpus.train, corpus.validation))
        return train, validation, corpus.tokenizer
    data = DataArguments(None if name == STANDARD_LIBRARY else name, block_size=block_size, max_eval_samples=2048)
    return load_data(data, model, seed=42)


def torch_headers(vocab_size: int, folders: tuple[str, ...] = HEADERS) -> Corpus:
    """The C++ headers that come with torch, as a second text of another kind; generated tables are left out."""
    root = Path(torch.__file__).parent / "include"
    return load_documents(
        _texts(root, (path for folder in folders for path in root.glob(f"{folder}/**/*.h*"))), vocab_size
    )


def installed_sources(vocab_size: int, root: Path | None = None) -> Corpus:
    """The standard library's source code and that of every installed package: some hundred million tokens."""
    root = root or Path(sysconfig.get_paths()["purelib"])
    return load_documents([*standard_library_documents(), *_texts(root, root.glob("**/*.py"))], vocab_size)


def _texts(root: Path, paths: Iterable[Path]) -> list[tuple[str, str]]:
    """Name and text of the files of at most 300 kB; larger ones are generated."""
    return [
        (path.relative_to(root).as_posix(), path.read_text(encoding="utf-8", errors="replace"))
        for path in sorted(paths)
        if path.stat().st_size < 300_000
    ]


FOUND_TEXTS = {TORCH_HEADERS: torch_headers, INSTALLED_SOURCES: installed_sources}
