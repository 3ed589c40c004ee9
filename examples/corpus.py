"""The embedded data of the examples: the source code of the running Python's standard library.

Real text that every machine has, so that examples, benchmarks and tests train without a download. It is
tokenised by a byte-level BPE that is trained on it, once; tokenizer and tokens are cached.

    corpus = load_standard_library(vocab_size=2048)
    train = TokenBlocks(corpus.train, block_size=128)      # train[0] -> {"input_ids": ..., "labels": ...}

Deterministic: the same Python version gives the same files, the same split, the same tokens.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset, Subset
from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # the 256 bytes and END_OF_TEXT
SMALLEST_CORPUS = 1_000_000  # characters; an ordinary standard library has about ten times as many
VALIDATION_SHARE = 0.05
# What is not the library's own code: tests, what pip installed, generated tables (code pages, help texts).
FOLDERS_LEFT_OUT = frozenset(
    {"test", "tests", "idle_test", "__pycache__"}
    | {"site-packages", "dist-packages", "lib-dynload"}
    | {"encodings", "pydoc_data"}
)
FILES_LEFT_OUT = ("_sysconfigdata",)  # differs from build to build and holds paths of the machine
LAYOUT = 1  # raise it when the way from files to tokens changes, so that no old cache is read


@dataclass(frozen=True)
class Corpus:
    """Tokens of a training and a validation text, and the tokenizer that made them."""

    tokenizer: PreTrainedTokenizerFast
    train: np.ndarray  # (train_tokens,) uint16 or uint32
    validation: np.ndarray  # (validation_tokens,)


class TokenBlocks(Dataset):
    """A token stream cut into consecutive blocks; the last tokens that fill no block are left out."""

    def __init__(self, tokens: np.ndarray, block_size: int) -> None:
        if block_size < 2:
            raise ValueError(f"block_size must be at least 2 tokens, got {block_size}")
        if len(tokens) < block_size:
            raise ValueError(
                f"block_size must be at most the number of tokens, {len(tokens)}, got {block_size}; "
                "give a smaller block or more text"
            )
        count = len(tokens) // block_size
        self.blocks = tokens[: count * block_size].reshape(count, block_size)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self.blocks[index].astype(np.int64))
        return {"input_ids": ids, "labels": ids}


def evenly_spaced(dataset: Dataset, count: int | None) -> Dataset:
    """At most `count` items from all over the data set, so that a small sample sees every part of it."""
    if count is None or count >= len(dataset):
        return dataset
    if count < 1:
        raise ValueError(f"the number of validation blocks must be at least 1, got {count}")
    return Subset(dataset, np.linspace(0, len(dataset) - 1, count).round().astype(int).tolist())


def load_standard_library(vocab_size: int = 2048, cache_folder: str | Path | None = None) -> Corpus:
    """The standard library's source code as a `Corpus`; built in some ten seconds, then read from the cache.

    Args:
        vocab_size: size of the byte-level BPE, at least 257.
        cache_folder: default is `$HF_STABLESPAM_CACHE`, or `~/.cache/hf_stablespam`.
    """
    documents = list(standard_library_documents())
    characters = sum(len(text) for _, text in documents)
    if characters < SMALLEST_CORPUS:
        raise FileNotFoundError(
            f"the standard library at {sysconfig.get_paths()['stdlib']} has only {characters:,} characters "
            "of source code; use a Python with its sources, or give --dataset_name"
        )
    return load_documents(documents, vocab_size, cache_folder)


def standard_library_documents() -> Iterator[tuple[str, str]]:
    """Name and text of every source file of the standard library, in the order of their names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - FOLDERS_LEFT_OUT)
        for file in sorted(files):
            if file.endswith(".py") and not file.startswith(FILES_LEFT_OUT):
                path = Path(folder, file)
                yield path.relative_to(root).as_posix(), path.read_text(encoding="utf-8", errors="replace")


def load_documents(
    documents: Iterable[tuple[str, str]], vocab_size: int, cache_folder: str | Path | None = None
) -> Corpus:
    """Tokenises named texts, or reads what an earlier call with the same arguments left in the cache."""
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"vocab_size must be at least {SMALLEST_VOCABULARY}, one for each byte and {END_OF_TEXT}; got {vocab_size}"
        )
    documents = list(documents)
    folder = _cache_root(cache_folder) / _cache_key(documents, vocab_size)
    if folder.is_dir():
        try:
            return _read(folder)
        except Exception as error:  # whatever a damaged file makes of the three readers
            logger.warning("Building %s again, it could not be read: %s", folder, error)
            shutil.rmtree(folder)
    logger.warning("Building the tokens of %d files in %s", len(documents), folder)
    corpus = _build(documents, vocab_size)
    _write(corpus, folder)
    return corpus


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab_size` tokens; `<|endoftext|>` begins, ends and pads."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _as_transformers(tokenizer)


def is_validation(name: str) -> bool:
    """The side of the split a document is on: by its name alone, so that new files move no old one."""
    fraction = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    return fraction < VALIDATION_SHARE


def _build(documents: list[tuple[str, str]], vocab_size: int) -> Corpus:
    train = [text for name, text in documents if not is_validation(name)]
    validation = [text for name, text in documents if is_validation(name)]
    tokenizer = train_tokenizer(train, vocab_size)
    return Corpus(tokenizer, encode(tokenizer, train), encode(tokenizer, validation))


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """All texts as one stream of token ids, each text followed by the end-of-text token."""
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    encodings = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    end = [tokenizer.eos_token_id]
    parts = [np.array(encoding.ids + end, dtype=dtype) for encoding in encodings]
    return np.concatenate(parts) if parts else np.zeros(0, dtype)


def _as_transformers(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def _cache_root(folder: str | Path | None) -> Path:
    return Path(folder or os.environ.get("HF_STABLESPAM_CACHE") or Path.home() / ".cache" / "hf_stablespam")


def _cache_key(documents: list[tuple[str, str]], vocab_size: int) -> str:
    digest = hashlib.sha256(f"{LAYOUT} {VALIDATION_SHARE} {tokenizers.__version__}".encode())
    for name, text in documents:
        digest.update(f"\0{name}\0{len(text)}\0".encode())
        digest.update(text.encode())
    return f"corpus-py{platform.python_version()}-vocab{vocab_size}-{digest.hexdigest()[:16]}"


def _read(folder: Path) -> Corpus:
    tokenizer = _as_transformers(Tokenizer.from_file(str(folder / "tokenizer.json")))
    return Corpus(tokenizer, np.load(folder / "train.npy"), np.load(folder / "validation.npy"))


def _write(corpus: Corpus, folder: Path) -> None:
    """Appears under its name only when complete, so that runs started together never read half a file."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        unfinished = Path(scratch, folder.name)
        unfinished.mkdir()
        corpus.tokenizer.backend_tokenizer.save(str(unfinished / "tokenizer.json"))
        np.save(unfinished / "train.npy", corpus.train)
        np.save(unfinished / "validation.npy", corpus.validation)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster, with the same content
                raise
