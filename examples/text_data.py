"""Any text data set, from the hub or from disk, as blocks of tokens; streamed if asked for.

    train, validation, tokenizer = load_text_data("allenai/c4", "en", streaming=True, ...)

The name is a file (`.txt`, `.json`, `.jsonl`, `.csv`, `.parquet`), a local folder, or a data set of the hub.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from corpus import train_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

if TYPE_CHECKING:  # a machine that trains on the standard library may lack it
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

BUILDERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
SHUFFLE_BUFFER = 10_000  # documents, when streaming
TOKENIZER_DOCUMENTS = 10_000  # from which a vocabulary is trained when no tokenizer is named


def load_text_data(
    name: str,
    config: str | None = None,
    *,
    text_column: str = "text",
    streaming: bool = False,
    validation_documents: int = 1000,
    tokenizer_name: str | None = None,
    vocab_size: int = 32_000,
    block_size: int = 256,
    seed: int = 42,
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset, PreTrainedTokenizerBase]:
    """Training blocks, validation blocks and the tokenizer.

    Args:
        name: data set of the hub, local folder, or file.
        config: the data set's configuration, such as "en" of C4.
        text_column: the column that holds the text.
        streaming: read while training; nothing is stored. The number of training blocks is then unknown.
        validation_documents: how many documents to hold out where the data set has no validation split.
        tokenizer_name: tokenizer of the hub or a folder; without it a byte-level BPE is trained on the data.
        vocab_size: of that BPE.
        block_size: tokens per block.
        seed: of the shuffling.
    """
    train, validation = split(open_dataset(name, config, streaming), validation_documents, seed)
    for part in (train, validation):
        check_column(part, text_column, name)
    if tokenizer_name:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)
    else:
        tokenizer = train_tokenizer((row[text_column] for row in islice(train, TOKENIZER_DOCUMENTS)), vocab_size)
    if streaming:
        train = train.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    train, validation = (to_blocks(part, tokenizer, text_column, block_size) for part in (train, validation))
    for part in (train, validation):
        if not streaming and len(part) == 0:
            raise ValueError(
                f"block_size must be at most the tokens of {name} and of its validation part, got {block_size}"
            )
    return train, validation, tokenizer


def open_dataset(name: str, config: str | None, streaming: bool) -> DatasetDict | IterableDatasetDict:
    """The data set with all its splits."""
    from datasets import load_dataset

    path = Path(name)
    if not path.is_file():
        return load_dataset(name, config, streaming=streaming)
    if path.suffix not in BUILDERS:
        raise ValueError(
            f"dataset_name must be a file ending in {', '.join(BUILDERS)}, a folder or a hub name, got {name}"
        )
    return load_dataset(BUILDERS[path.suffix], data_files=str(path), streaming=streaming)


def split(
    dataset: DatasetDict | IterableDatasetDict, validation_documents: int, seed: int
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset]:
    """The data set's own training and validation splits, or documents held out of the training split."""
    if "train" not in dataset:
        raise ValueError(f"dataset_name must have a split called train, this one has {sorted(dataset)}")
    train = dataset["train"]
    for name in ("validation", "test"):
        if name in dataset:
            return train, dataset[name]
    if not hasattr(train, "train_test_split"):  # streamed
        return train.skip(validation_documents), train.take(validation_documents)
    if len(train) < 2:
        raise ValueError("dataset_name must have at least 2 documents, one of them for validation; got 1")
    parts = train.train_test_split(test_size=min(validation_documents, max(1, len(train) // 10)), seed=seed)
    return parts["train"], parts["test"]


def check_column(dataset: Dataset | IterableDataset, text_column: str, name: str) -> None:
    """Raises ValueError when the column does not exist."""
    columns = dataset.column_names or next(iter(dataset)).keys()
    if text_column not in columns:
        raise ValueError(f"text_column must be one of the columns of {name}, {sorted(columns)}, got {text_column!r}")


def to_blocks(
    dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, text_column: str, block_size: int
) -> Dataset | IterableDataset:
    """Documents joined by the end-of-text token and cut into blocks; what fills no block is left out."""
    columns = dataset.column_names or list(next(iter(dataset)))
    return dataset.map(
        block_maker(tokenizer, text_column, block_size), batched=True, remove_columns=columns, batch_size=1000
    )


def block_maker(
    tokenizer: PreTrainedTokenizerBase, text_column: str, block_size: int
) -> Callable[[dict[str, list[str]]], dict[str, list[list[int]]]]:
    """The function that `datasets` maps over batches of documents."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def make_blocks(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ids = tokenizer(batch[text_column], add_special_tokens=False, verbose=False)["input_ids"]
        stream = list(chain.from_iterable(document + end for document in ids))
        blocks = list(cut(stream, block_size))
        return {"input_ids": blocks, "labels": [block.copy() for block in blocks]}

    return make_blocks


def cut(stream: list[int], block_size: int) -> Iterable[list[int]]:
    """Consecutive blocks of exactly `block_size` tokens."""
    return (stream[i : i + block_size] for i in range(0, len(stream) - block_size + 1, block_size))
