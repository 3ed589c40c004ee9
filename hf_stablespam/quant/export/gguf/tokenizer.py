"""A tokenizer of transformers → the vocabulary in a GGUF file."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED_WORD = "|".join(
    rf"[^\r\n\p{{L}}\p{{N}}]?{word}{_CONTRACTIONS}?" for word in (f"{_UPPER}*{_LOWER}+", f"{_UPPER}+{_LOWER}*")
)
_REST_WITH_SLASH = _REST.replace(r"[\r\n]*", r"[\r\n/]*", 1)
# Parts of a byte-level pre-tokenizer → llama.cpp's name of what does the same.
PRE_TOKENIZERS: dict[tuple[tuple[str, Any], ...], str] = {
    (("bytes", True),): "gpt-2",
    (("digits", True), ("bytes", True)): "smollm",
    (("split", rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_REST}"), ("bytes", False)): "llama-bpe",
    (("split", rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_REST}"), ("bytes", False)): "qwen2",
    (("split", rf"{_CASED_WORD}|\p{{N}}{{1,3}}|{_REST_WITH_SLASH}"), ("bytes", False)): "gpt-4o",
}
NO_REMEDY = (
    "convert the checkpoint with llama.cpp's convert_hf_to_gguf.py --outtype f16, which knows more tokenizers, and pack"
    " its file with hf-stablespam repack"
)


class Vocabulary(NamedTuple):
    """What llama.cpp must know of a tokenizer.

    Attributes:
        model: ``"gpt2"`` (byte-level BPE) or ``"llama"`` (SentencePiece's BPE).
        pre: llama.cpp's name of the pre-tokenizer; None for ``"llama"``.
        tokens: text of every token, by id, without gaps.
        types: `gguf.TokenType` of each.
        scores: of each, for ``"llama"``, else None.
        merges: for ``"gpt2"``, else None.
        special: name (``"bos"``, …) → id.
        adds: name → whether the tokenizer puts it at the text's end or beginning.
        space_prefix: whether a text begins with a space, for ``"llama"``, else None.
        chat_template: or None.
    """

    model: str
    pre: str | None
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[str] | None
    special: dict[str, int]
    adds: dict[str, bool]
    space_prefix: bool | None
    chat_template: str | None


def read_vocabulary(processing_class: Any, rows: int) -> Vocabulary:
    """The vocabulary of a tokenizer, filled up to the rows of the embedding.

    Args:
        processing_class: a fast tokenizer of transformers, or a processor that has one.
        rows: of the model's embedding; it may be padded beyond the tokenizer.

    Raises:
        ValueError: a slow tokenizer, another kind than byte-level BPE or SentencePiece's BPE, a pre-tokenizer that
            llama.cpp has no name for, or more tokens than the embedding has rows.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"processing_class must be a fast tokenizer, got {type(tokenizer).__name__}; {NO_REMEDY}")
    spec = json.loads(backend.to_str())
    kind, ids = spec["model"], {**spec["model"]["vocab"]} if isinstance(spec["model"]["vocab"], Mapping) else {}
    if kind["type"] != "BPE":
        raise ValueError(f"the tokenizer's model must be BPE, got {kind['type']!r}; {NO_REMEDY}")
    added = {token["id"]: token for token in spec["added_tokens"]}
    ids.update({token["content"]: id for id, token in added.items()})
    if max(ids.values()) >= rows:
        raise ValueError(
            f"the tokenizer has {max(ids.values()) + 1} tokens, the embedding only {rows} rows; call"
            " model.resize_token_embeddings(len(tokenizer)) before training"
        )
    sentencepiece = bool(kind.get("byte_fallback"))
    tokens, types = _tokens(ids, added, rows, kind.get("unk_token"), sentencepiece)
    pairs = [pair if isinstance(pair, list) else pair.split(" ", 1) for pair in kind["merges"]]
    return Vocabulary(
        model="llama" if sentencepiece else "gpt2",
        pre=None if sentencepiece else _pre_tokenizer(spec),
        tokens=tokens,
        types=types,
        scores=_scores(tokens, pairs) if sentencepiece else None,
        merges=None if sentencepiece else [" ".join(pair) for pair in pairs],
        special=_special(tokenizer),
        adds=_adds(tokenizer),
        space_prefix=_adds_space(spec) if sentencepiece else None,
        chat_template=_chat_template(tokenizer),
    )


def add_vocabulary(writer: Any, vocabulary: Vocabulary | None) -> None:
    """Write it; None, for a model without a tokenizer, says so in the file.

    Args:
        writer: a `gguf.GGUFWriter`.
        vocabulary: from `read_vocabulary`, or None.
    """
    if vocabulary is None:
        writer.add_tokenizer_model("none")
        return
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre or "default")
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    for name, id in vocabulary.special.items():
        getattr(writer, f"add_{name}_token_id")(id)
    for name, value in vocabulary.adds.items():
        getattr(writer, f"add_add_{name}_token")(value)
    if vocabulary.space_prefix is not None:
        writer.add_add_space_prefix(vocabulary.space_prefix)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def _pre_tokenizer(spec: Mapping[str, Any]) -> str:
    """llama.cpp's name of the pre-tokenizer."""
    parts = tuple(_part(part) for part in _flat(spec["pre_tokenizer"]))
    name = PRE_TOKENIZERS.get(parts)
    if name == "llama-bpe" and not spec["model"].get("ignore_merges"):
        name = "dbrx"  # the same pattern; merges decide there
    # To every token of a vocabulary of tiktoken's, as GPT-OSS's is, there is a way by merges.
    elif name not in (None, "llama-bpe", "gpt-4o") and spec["model"].get("ignore_merges"):
        name = None
    if name is None:
        raise ValueError(
            f"the tokenizer's pre-tokenizer has no known name in llama.cpp (tokenizer.ggml.pre): {parts!r}; {NO_REMEDY}"
        )
    return name


def _flat(pre_tokenizer: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if pre_tokenizer is None:
        return []
    if pre_tokenizer["type"] == "Sequence":
        return [part for inner in pre_tokenizer["pretokenizers"] for part in _flat(inner)]
    return [pre_tokenizer]


def _part(part: Mapping[str, Any]) -> tuple[str, Any]:
    """What of a part of a pre-tokenizer decides where it cuts."""
    if part["type"] == "ByteLevel" and not part.get("add_prefix_space"):
        return "bytes", part.get("use_regex", True)
    if part["type"] == "Digits":
        return "digits", part["individual_digits"]
    if part["type"] == "Split" and part["behavior"] == "Isolated" and not part.get("invert"):
        return "split", part["pattern"].get("Regex")
    return part["type"], None


def _tokens(
    ids: Mapping[str, int], added: Mapping[int, Any], rows: int, unknown: str | None, sentencepiece: bool
) -> tuple[list[str], list[int]]:
    """Text and type of every row of the embedding."""
    from gguf import TokenType

    texts = {id: text for text, id in ids.items()}
    tokens, types = [], []
    for id in range(rows):
        text = texts.get(id)
        if text is None:
            kind = TokenType.UNUSED
        elif id in added:
            kind = TokenType.CONTROL if added[id]["special"] else TokenType.USER_DEFINED
        elif sentencepiece and len(text) == 6 and text.startswith("<0x"):
            kind = TokenType.BYTE
        else:
            kind = TokenType.NORMAL
        if sentencepiece and text is not None and text == unknown:
            kind = TokenType.UNKNOWN
        tokens.append(f"[PAD{id}]" if text is None else text)
        types.append(int(kind))
    return tokens, types


def _scores(tokens: list[str], pairs: list[list[str]]) -> list[float]:
    """SentencePiece's scores: of two merges llama.cpp takes the one whose result scores higher, which came first."""
    rank: dict[str, int] = {}
    for index, pair in enumerate(pairs):
        rank.setdefault("".join(pair), index)
    return [-float(rank[token]) if token in rank else -float(len(pairs)) for token in tokens]


def _special(tokenizer: Any) -> dict[str, int]:
    found = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "unk", "sep", "pad", "mask")}
    return {name: id for name, id in found.items() if isinstance(id, int)}


def _adds(tokenizer: Any) -> dict[str, bool]:
    """Whether a text gets a token at its beginning and end: by trying."""
    ids = list(tokenizer("a")["input_ids"])
    special = _special(tokenizer)
    return {
        "bos": bool(ids) and ids[0] == special.get("bos") and len(ids) > 1,
        "eos": bool(ids) and ids[-1] == special.get("eos") and len(ids) > 1,
    }


def _adds_space(spec: Mapping[str, Any]) -> bool:
    """Whether a text begins with a space of its own."""
    schemes = [part.get("prepend_scheme") for part in _flat(spec["pre_tokenizer"]) if part["type"] == "Metaspace"]
    return '"Prepend"' in json.dumps(spec["normalizer"]) or any(scheme != "never" for scheme in schemes)


def _chat_template(tokenizer: Any) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    return template.get("default") if isinstance(template, Mapping) else template
