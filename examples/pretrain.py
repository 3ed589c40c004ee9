"""Pretrain a Llama from scratch: an ordinary Trainer script, in which Stable-SPAM is one option.

    python examples/pretrain.py --output_dir runs/tiny --model_size tiny --max_steps 300 \\
        --per_device_train_batch_size 16 --learning_rate 3e-3 --warmup_steps 30 --lr_scheduler_type cosine \\
        --eval_strategy steps --eval_steps 50 \\
        --optim stable_spam --max_grad_norm 0 --four_bit int4

The data is the source code of Python's standard library, unless `--dataset_name` names a data set of the hub
(or a folder, or a file); with `--streaming` it is read while training:

    python examples/pretrain.py --output_dir runs/c4 --model_size 60m --block_size 256 \\
        --dataset_name allenai/c4 --dataset_config_name en --streaming --tokenizer_name t5-base \\
        --max_steps 10000 --optim stable_spam --max_grad_norm 0 --four_bit fp4_e1m2 --bf16

Every option of TrainingArguments works. `--smoke` makes a few steps, to see that it runs;
`--resume_from_checkpoint last` goes on where an earlier run stopped.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from corpus import TokenBlocks, evenly_spaced, load_standard_library
from model_sizes import SHAPES
from text_data import load_text_data
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from hf_stablespam import (
    FourBitCallback,
    FourBitConfig,
    GradientNormCallback,
    LearningRateScaleCallback,
    MomentumResetCallback,
    SpikeRecorder,
    last_complete_checkpoint,
)


@dataclass
class ModelArguments:
    model_size: Literal["tiny", "moe-tiny", "9m", "20m", "60m", "130m", "350m", "1b"] = field(
        default="tiny",
        metadata={
            "help": "Shape of the Llama. `tiny` is `9m` with a vocabulary of 2,048; `moe-tiny` a mixture of 8 experts."
        },
    )
    vocab_size: int | None = field(
        default=None,
        metadata={"help": "Tokens of the vocabulary; default 2048 for tiny and moe-tiny, otherwise 32000."},
    )
    tokenizer_name: str | None = field(
        default=None,
        metadata={"help": "Tokenizer for --dataset_name; default: one trained on the data."},
    )

    def __post_init__(self) -> None:
        if self.vocab_size is None:
            self.vocab_size = 2048 if self.model_size.endswith("tiny") else 32_000


@dataclass
class DataArguments:
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Hub name, folder or file; default: Python's standard library."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Such as `en` of `allenai/c4`."})
    text_column: str = field(default="text", metadata={"help": "Column of the data set that holds the text."})
    streaming: bool = field(default=False, metadata={"help": "Read the data set while training."})
    block_size: int = field(default=128, metadata={"help": "Tokens per sequence."})
    max_eval_samples: int = field(default=512, metadata={"help": "Blocks used for each validation, at most."})
    smoke: bool = field(default=False, metadata={"help": "A few steps, to see that it runs."})
    validation_documents: int = field(
        default=1000, metadata={"help": "Documents to hold out of a data set without a validation split."}
    )


@dataclass
class StabilityArguments:
    four_bit: str | None = field(
        default=None,
        metadata={
            "help": "Format of 4-bit linear layers: int4, int4_asym, int4_signed, fp4_e1m2, fp4_e2m1, mxfp4, nvfp4."
        },
    )
    four_bit_group_size: int = field(default=128, metadata={"help": "Weights that share a scale."})
    gradient_norms: bool = field(default=False, metadata={"help": "Log gradient norms and clipped entries."})
    gradient_norms_by: Literal["block", "tensor"] | None = field(
        default=None, metadata={"help": "Log them for each block or tensor as well; implies --gradient_norms."}
    )
    record_spikes: bool = field(
        default=False, metadata={"help": "Write gradient spikes to spikes.jsonl in the output folder."}
    )
    reset_every: int | None = field(
        default=None,
        metadata={"help": "Reset the momentum every N update steps, of any Adam-like optimizer."},
    )
    embedding_lr_scale: float | None = field(
        default=None, metadata={"help": "Train the embedding with so many times the learning rate, by any optimizer."}
    )


class PretrainingTrainer(Trainer):
    """A Trainer that logs the perplexity beside every validation loss."""

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "eval_loss" in logs:
            logs["eval_perplexity"] = perplexity(logs["eval_loss"])
        super().log(logs, *args, **kwargs)


def perplexity(loss: float) -> float:
    """exp(loss); infinite where that is too large for a float, as it is after a divergence."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def llama(model_size: str, tokenizer: PreTrainedTokenizerBase, block_size: int) -> PreTrainedModel:
    """A Llama, or a mixture of experts, with random weights, drawn from the global seed."""
    hidden, intermediate, layers, heads = SHAPES[model_size]
    is_mixture = model_size.startswith("moe")
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": intermediate}
    experts["norm_topk_prob"] = True  # as the pretrained ones, and as llama.cpp computes it
    config = AutoConfig.for_model(
        "qwen3_moe" if is_mixture else "llama",
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=max(block_size, 1024),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=False,
        **(experts | {"head_dim": hidden // heads} if is_mixture else {}),
    )
    return AutoModelForCausalLM.from_config(config)


def load_data(
    data: DataArguments, model: ModelArguments, seed: int
) -> tuple[Dataset, Dataset, PreTrainedTokenizerBase]:
    """Training blocks, validation blocks and the tokenizer."""
    if data.dataset_name is None:
        corpus = load_standard_library(model.vocab_size)
        train = TokenBlocks(corpus.train, data.block_size)
        validation = TokenBlocks(corpus.validation, data.block_size)
        return train, evenly_spaced(validation, data.max_eval_samples), corpus.tokenizer
    train, validation, tokenizer = load_text_data(
        data.dataset_name,
        data.dataset_config_name,
        text_column=data.text_column,
        streaming=data.streaming,
        validation_documents=data.validation_documents,
        tokenizer_name=model.tokenizer_name,
        vocab_size=model.vocab_size,
        block_size=data.block_size,
        seed=seed,
    )
    if data.streaming:
        return train, validation.take(data.max_eval_samples), tokenizer
    return train, evenly_spaced(validation, data.max_eval_samples), tokenizer


def make_callbacks(stability: StabilityArguments) -> list[TrainerCallback]:
    """What was asked for on the command line, each a callback that any other script can use as well."""
    callbacks: list[TrainerCallback] = []
    if stability.four_bit is not None:
        config = FourBitConfig(
            weight=stability.four_bit,
            # A zero point is of use for weights; activations keep the symmetric grid, as in the paper.
            activation="int4" if stability.four_bit in ("int4_asym", "int4_signed") else stability.four_bit,
            group_size=stability.four_bit_group_size,
        )
        callbacks.append(FourBitCallback(config))
    if stability.embedding_lr_scale is not None:
        callbacks.append(LearningRateScaleCallback(embedding=stability.embedding_lr_scale))
    if stability.reset_every is not None:
        callbacks.append(MomentumResetCallback(every=stability.reset_every))
    if stability.gradient_norms or stability.gradient_norms_by:
        callbacks.append(GradientNormCallback(by=stability.gradient_norms_by))
    if stability.record_spikes:
        callbacks.append(SpikeRecorder())
    return callbacks


def checkpoint_to_resume(arguments: TrainingArguments) -> str | None:
    """The checkpoint that --resume_from_checkpoint names; `last` is the newest complete one."""
    if arguments.resume_from_checkpoint != "last":
        return arguments.resume_from_checkpoint
    checkpoint = last_complete_checkpoint(arguments.output_dir)
    if checkpoint is None:
        raise FileNotFoundError(
            f"resume_from_checkpoint=last needs a complete checkpoint in {arguments.output_dir}, which has none; "
            "train with --save_steps first, or name a checkpoint's folder"
        )
    return checkpoint


def check(model: ModelArguments, data: DataArguments, training: TrainingArguments) -> None:
    """Errors that would otherwise come after the data was read, or never."""
    if data.streaming and data.dataset_name is None:
        raise ValueError("streaming needs --dataset_name: the embedded data is not streamed")
    if data.streaming and training.max_steps <= 0:
        raise ValueError("streaming needs --max_steps: a stream has no known length")
    if data.max_eval_samples < 1:
        raise ValueError(f"max_eval_samples must be at least 1, got {data.max_eval_samples}")
    if model.tokenizer_name and data.dataset_name is None:
        raise ValueError("tokenizer_name needs --dataset_name: the embedded data has its own tokenizer")


def main(command_line: list[str] | None = None, more_callbacks: Sequence[TrainerCallback] = ()) -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, StabilityArguments, TrainingArguments))
    model_args, data_args, stability_args, training_args = parser.parse_args_into_dataclasses(command_line)
    if data_args.smoke:
        training_args.max_steps, training_args.logging_steps, data_args.max_eval_samples = 4, 2, 16
    check(model_args, data_args, training_args)
    callbacks = [*make_callbacks(stability_args), *more_callbacks]
    checkpoint = checkpoint_to_resume(training_args)

    set_seed(training_args.seed)
    train, validation, tokenizer = load_data(data_args, model_args, training_args.seed)
    model = llama(model_args.model_size, tokenizer, data_args.block_size)
    trainer = PretrainingTrainer(
        model=model,
        args=training_args,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        data_collator=default_data_collator,
        callbacks=callbacks,
    )

    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()  # with the tokenizer
    tokens_per_second = result.metrics["train_samples_per_second"] * data_args.block_size
    trainer.log_metrics("train", result.metrics | {"train_tokens_per_second": round(tokens_per_second)})
    trainer.save_metrics("train", result.metrics | {"train_tokens_per_second": round(tokens_per_second)})

    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    trainer.save_state()


if __name__ == "__main__":
    main(sys.argv[1:])
