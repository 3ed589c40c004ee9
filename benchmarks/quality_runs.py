"""One pretraining of the quality benchmark: what is trained, on what, and what is measured."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[1]))

from corpus import Corpus, TokenBlocks, evenly_spaced, load_documents
from pretrain import DataArguments, ModelArguments, llama, load_data
from stabilize_lion import Lion
from torch.utils.data import Dataset
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from hf_stablespam import FourBitCallback, FourBitConfig, StabilizeCallback
from tests.reference.official_stable_spam import OfficialStableSPAM

EVALUATIONS = 20  # along each run, on a few blocks: how fast the loss falls
CURVE_BLOCKS, FINAL_BLOCKS = 64, 256
HEADERS = ("c10", "torch", "pybind11", "google", "fmt")  # folders of torch/include
STANDARD_LIBRARY, TORCH_HEADERS = "standard_library", "torch_headers"


@dataclass(frozen=True)
class Method:
    """An optimizer as the Trainer's arguments ask for it, and the learning rates at which it is tried."""

    optim: str = "stable_spam"
    optim_args: str | None = None
    targets: str | None = None  # optim_target_modules, for GaLore
    clip: float = 0.0  # the Trainer's own max_grad_norm
    stabilized: bool = False
    own: type[torch.optim.Optimizer] | None = None  # built here, because the Trainer has no name for it
    rates: tuple[float, ...] = (5e-4, 1e-3, 3e-3, 1e-2, 2e-2)
    arguments: dict[str, Any] = field(default_factory=dict)  # further TrainingArguments

    def optimizer(self, model: torch.nn.Module, learning_rate: float, steps: int) -> torch.optim.Optimizer | None:
        if self.own is None:
            return None
        options: dict[str, Any] = {"lr": learning_rate}
        if self.own is OfficialStableSPAM:
            options |= {"reset_interval": int(str(self.optim_args).removeprefix("reset_interval=")), "decay": steps}
        return self.own(model.parameters(), **options)


TARGETS = r".*\.(self_attn|mlp)\..*_proj"
GALORE = "rank=32,update_proj_gap=50,scale=0.25"
PLAIN = "clip_beta=none,norm_betas=none,reset_interval=none,decay_steps=none"
GALORE_RATES, LION_RATES = (3e-3, 1e-2, 3e-2), (5e-5, 1e-4, 3e-4, 1e-3, 2e-3)
RESET = "reset_interval=200"  # in runs of 500 steps: the proportion of the paper's short runs
FASTER = {"adam_beta2": 0.95}  # the second moment's memory in most language models since GPT-3
SPAM_ARGUMENTS = "reset_interval=200,warmup_steps=60"


def _galore(options: str) -> Method:
    return Method(optim_args=f"{GALORE},{options}", targets=TARGETS, rates=GALORE_RATES)


METHODS = {
    "adamw": Method("adamw_torch"),
    "adamw_clipped": Method("adamw_torch", clip=1.0),
    "adamw_beta95": Method("adamw_torch", arguments=FASTER),
    "adamw_clipped_beta95": Method("adamw_torch", clip=1.0, arguments=FASTER),
    "adamw_stabilized": Method("adamw_torch", stabilized=True),
    "adafactor": Method("adafactor"),
    "spam": Method("spam", SPAM_ARGUMENTS, arguments={"adam_epsilon": 1e-6}),
    "lion": Method("sgd", own=Lion, rates=LION_RATES),
    "lion_clipped": Method("sgd", own=Lion, clip=1.0, rates=LION_RATES),
    "lion_stabilized": Method("sgd", own=Lion, stabilized=True, rates=LION_RATES),
    "galore": _galore(PLAIN),
    "galore_stable_spam": _galore("reset_interval=none"),
    # Stable-SPAM as it comes: no reset falls into 500 steps, the decay runs over them
    "stable_spam": Method(),
    "stable_spam_8bit": Method(optim_args="state_bits=8"),
    "stable_spam_4bit": Method(optim_args="state_bits=4"),
    # its parts: each left out, each alone
    "stable_spam_reset": Method(optim_args=RESET),
    "without_clip": Method(optim_args=f"{RESET},clip_beta=none"),
    "without_norm": Method(optim_args=f"{RESET},norm_betas=none"),
    "without_decay": Method(optim_args=f"{RESET},decay_steps=none"),
    "only_clip": Method(optim_args="norm_betas=none,reset_interval=none,decay_steps=none"),
    "only_norm": Method(optim_args="clip_beta=none,reset_interval=none,decay_steps=none"),
    "only_reset": Method(optim_args=f"{RESET},clip_beta=none,norm_betas=none,decay_steps=none"),
    "only_decay": Method(optim_args="clip_beta=none,norm_betas=none,reset_interval=none"),
    # resets: how often, and as the official code does them
    "stable_spam_reset100": Method(optim_args="reset_interval=100"),
    "official_reset100": Method("sgd", "reset_interval=100", own=OfficialStableSPAM),
    "official_reset200": Method("sgd", RESET, own=OfficialStableSPAM),
    # candidates for better defaults
    "stable_spam_beta95": Method(arguments=FASTER),
    "stable_spam_slow_norm": Method(optim_args="norm_betas=0.85:0.999"),
    "stable_spam_beta95_slow_norm": Method(optim_args="norm_betas=0.85:0.999", arguments=FASTER),
    "stable_spam_floor25": Method(optim_args="decay_floor=0.25"),
    "stable_spam_floor75": Method(optim_args="decay_floor=0.75"),
    "stable_spam_clip99": Method(optim_args="clip_beta=0.99"),
}

PRECISIONS: dict[str, FourBitConfig | None] = {
    "full": None,
    "int4": FourBitConfig(weight="int4", activation="int4"),
    "int4_no_outliers": FourBitConfig(weight="int4", activation="int4", activation_outliers=0),
    "int4_asym": FourBitConfig(weight="int4_asym", activation="int4"),
    # without kept weights its 15 levels are those of int4, so this is the paper's FP4 as it was meant
    "fp4_e1m2": FourBitConfig(weight="fp4_e1m2", activation="fp4_e1m2", weight_outliers=2),
    "mxfp4": FourBitConfig(weight="mxfp4", activation="mxfp4"),
    "nvfp4": FourBitConfig.nvfp4(),
    "nvfp4_4or6": FourBitConfig(weight="nvfp4", activation="nvfp4", four_over_six=True),
    "nvfp4_gradient": FourBitConfig.nvfp4(gradient=True),
}


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
        train, validation, tokenizer = data_for(self.data, self.model_size, self.block_size)
        set_seed(self.seed)
        model = llama(self.model_size, tokenizer, self.block_size)
        callbacks: list[TrainerCallback] = [] if formats is None else [FourBitCallback(formats)]
        if method.stabilized:
            callbacks.append(StabilizeCallback())
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
            start = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - start
            curve = [(row["step"], row["eval_loss"]) for row in trainer.state.log_history if "eval_loss" in row]
            loss = trainer.evaluate(evenly_spaced(validation, FINAL_BLOCKS))["eval_loss"]
        return asdict(self) | {
            "eval_loss": round(loss, 5),
            "perplexity": round(math.exp(loss), 3) if loss < 700 else math.inf,
            "survived": math.isfinite(loss),
            "seconds_per_step": round(seconds / self.steps, 4),
            "curve": " ".join(f"{step}:{value:.4f}" for step, value in curve),
        }

    def arguments(self, folder: str) -> TrainingArguments:
        """Equal for all runs but for the optimizer, the learning rate and the seed."""
        method = METHODS[self.method]
        return TrainingArguments(
            folder,
            optim=method.optim,
            optim_args=None if method.own else method.optim_args,
            optim_target_modules=method.targets,
            learning_rate=self.learning_rate,
            max_grad_norm=method.clip,
            max_steps=self.steps,
            per_device_train_batch_size=self.batch_size,
            per_device_eval_batch_size=2 * self.batch_size,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": 0.1},
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
            **method.arguments,
        )


@lru_cache(maxsize=2)
def data_for(name: str, model_size: str, block_size: int) -> tuple[Dataset, Dataset, Any]:
    """Training blocks, validation blocks and tokenizer: the standard library, torch's headers, or a data set."""
    model = ModelArguments(model_size=model_size)
    if name == TORCH_HEADERS:
        corpus = torch_headers(model.vocab_size)
        train, validation = (TokenBlocks(tokens, block_size) for tokens in (corpus.train, corpus.validation))
        return train, validation, corpus.tokenizer
    data = DataArguments(None if name == STANDARD_LIBRARY else name, block_size=block_size, max_eval_samples=2048)
    return load_data(data, model, seed=42)


def torch_headers(vocab_size: int, folders: tuple[str, ...] = HEADERS) -> Corpus:
    """The C++ headers that come with torch, as a second text of another kind; generated tables are left out."""
    root = Path(torch.__file__).parent / "include"
    paths = sorted(path for folder in folders for path in root.glob(f"{folder}/**/*.h*"))
    documents = [
        (path.relative_to(root).as_posix(), path.read_text(encoding="utf-8", errors="replace"))
        for path in paths
        if path.stat().st_size < 300_000
    ]
    return load_documents(documents, vocab_size)
