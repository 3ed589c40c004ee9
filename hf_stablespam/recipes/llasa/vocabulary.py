"""`SpeechVocabulary`: eight markers and the codes of a codec as tokens of a text tokenizer, by arithmetic."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

TEXT_START, TEXT_END = "<|TEXT_UNDERSTANDING_START|>", "<|TEXT_UNDERSTANDING_END|>"
SPEECH_START, SPEECH_END = "<|SPEECH_GENERATION_START|>", "<|SPEECH_GENERATION_END|>"
# In the order of the released models, whose first new id is that of the first marker (train_tts.py).
MARKERS = (
    "<|TEXT_GENERATION_START|>",
    "<|TEXT_GENERATION_END|>",
    TEXT_START,
    TEXT_END,
    SPEECH_START,
    SPEECH_END,
    "<|SPEECH_UNDERSTANDING_START|>",
    "<|SPEECH_UNDERSTANDING_END|>",
)


@dataclass(frozen=True)
class SpeechVocabulary:
    """Where a codec's codes lie among the tokens: code ``c`` is token ``first_code + c``.

    Args:
        markers: id of each of the eight markers, by its text such as ``"<|SPEECH_GENERATION_START|>"``.
        first_code: id of code 0; 128,264 for Llama-3.2.
        codebook_size: number of codes; 65,536 for X-codec2.
        end_id: id of ``"<|SPEECH_GENERATION_END|>"``, with which speech ends.

    Example:
        >>> vocabulary = SpeechVocabulary(dict(zip(MARKERS, range(8))), first_code=8, codebook_size=32, end_id=5)
        >>> vocabulary.encode([0, 31])
        [8, 39]
        >>> vocabulary.decode([8, 39])
        [0, 31]
    """

    markers: dict[str, int] = field(hash=False)
    first_code: int
    codebook_size: int
    end_id: int

    @property
    def start_id(self) -> int:
        """Id of ``"<|SPEECH_GENERATION_START|>"``, after which the codes come."""
        return self.markers[SPEECH_START]

    @property
    def token_ids(self) -> list[int]:
        """Ids of the markers and of all codes: the embedding rows that speech training must reach.

        What PEFT's `LoraConfig(trainable_token_indices=...)` takes.
        """
        return [*self.markers.values(), *range(self.first_code, self.first_code + self.codebook_size)]

    def encode(self, codes: Sequence[int]) -> list[int]:
        """Token ids of codes.

        Args:
            codes: integers in [0, `codebook_size`); a list, an array or a tensor.

        Raises:
            ValueError: a code out of its range, or a number that is not an integer.
        """
        array = _integers("codes", codes)
        outside = array[(array < 0) | (array >= self.codebook_size)]
        if len(outside):
            raise ValueError(f"a code must be in [0, {self.codebook_size}), the codebook's size, got {outside[0]}")
        return (array + self.first_code).tolist()

    def decode(self, ids: Sequence[int]) -> list[int]:
        """Codes of token ids; the inverse of `encode`.

        Args:
            ids: token ids of codes, without markers; a list, an array or a tensor.

        Raises:
            ValueError: an id that is no code.
        """
        array = _integers("ids", ids) - self.first_code
        outside = array[(array < 0) | (array >= self.codebook_size)]
        if len(outside):
            last = self.first_code + self.codebook_size - 1
            raise ValueError(
                f"token {outside[0] + self.first_code} is no code, those are {self.first_code} to {last}; "
                "generate with SpeechTokensLogitsProcessor, and cut the ids at end_id"
            )
        return array.tolist()


def add_speech_tokens(
    processing_class: Any, codebook_size: int = 65536, model: PreTrainedModel | None = None
) -> SpeechVocabulary:
    """Give a tokenizer the markers and codes of Llasa, and a model the embedding rows for them.

    The eight markers come first, then ``<|s_0|>`` to ``<|s_{codebook_size - 1}|>``. A tokenizer that has them already,
    one that was saved after training say, stays as it is: call this after loading too, and it checks that tokenizer
    and model agree: a model with rows for some of the codes only is refused, and one without any gets new rows, with a
    warning, since a model that was trained for speech has them. New rows are drawn from the mean and covariance of the
    old ones (`resize_token_embeddings`); a head that is tied to the embedding stays tied. Rows beyond the tokens, which
    pad a vocabulary, stay.

    Args:
        processing_class: tokenizer, or a processor that holds one.
        codebook_size: number of codes of the codec; default 65,536, that of X-codec2.
        model: causal language model to resize; default None, the tokenizer only. Give it before
            `get_peft_model`.

    Returns:
        Where the tokens lie.

    Raises:
        ValueError: the tokenizer has some of the tokens but not all, or a codebook of another size, or codes that are
            not contiguous; the model has some rows for the codes but not all; the model is a `PeftModel` without
            rows for them.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
        >>> add_speech_tokens(tokenizer, codebook_size=64).first_code
        8
    """
    if isinstance(codebook_size, bool) or not isinstance(codebook_size, int) or codebook_size < 1:
        raise ValueError(f"codebook_size must be an integer of at least 1, got {codebook_size!r}")
    tokenizer = tokenizer_of(processing_class)
    is_new = _add_tokens(tokenizer, codebook_size)
    vocabulary = _vocabulary_of(tokenizer, codebook_size)
    if model is not None:
        _resize(model, tokenizer, vocabulary, is_new)
    return vocabulary


def tokenizer_of(processing_class: Any) -> PreTrainedTokenizerBase:
    """The tokenizer itself, or the one that a processor holds."""
    return getattr(processing_class, "tokenizer", processing_class)


def embedding_rows(model: Any) -> int:
    """How many tokens the model has an embedding for."""
    return model.get_input_embeddings().weight.shape[0]


def check_rows(model: Any, vocabulary: SpeechVocabulary) -> None:
    """Raises ValueError where the model has no embedding row for one of the vocabulary's tokens."""
    rows = embedding_rows(model)
    needed = max(vocabulary.first_code + vocabulary.codebook_size, 1 + max(vocabulary.markers.values()))
    if rows < needed:
        raise ValueError(
            f"the model has {rows} embedding rows, but the speech vocabulary needs {needed}: load the model that was "
            "saved with this tokenizer, or call add_speech_tokens(tokenizer, codebook_size, model=model)"
        )


def _add_tokens(tokenizer: PreTrainedTokenizerBase, codebook_size: int) -> bool:
    """Adds the tokens where there are none of them; whether there were none."""
    from transformers import AddedToken

    known = tokenizer.get_vocab()
    tokens = [*MARKERS, *(f"<|s_{code}|>" for code in range(codebook_size))]
    missing = [token for token in tokens if token not in known]
    if missing and len(missing) < len(tokens):
        raise ValueError(
            f"the tokenizer has {len(tokens) - len(missing)} of the {len(tokens)} speech tokens, but not "
            f"{missing[0]!r}: give its own codebook_size, or begin with a tokenizer that has none of them"
        )
    if f"<|s_{codebook_size}|>" in known:
        raise ValueError(
            f"the tokenizer has a token '<|s_{codebook_size}|>', beyond a codebook_size of {codebook_size}: "
            "give the codebook_size that it was made with"
        )
    if missing:
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])
    return bool(missing)


def _vocabulary_of(tokenizer: PreTrainedTokenizerBase, codebook_size: int) -> SpeechVocabulary:
    known = tokenizer.get_vocab()
    first = known["<|s_0|>"]
    for code in range(codebook_size):
        if known[f"<|s_{code}|>"] != first + code:
            raise ValueError(
                f"the codes' tokens must be contiguous: '<|s_0|>' is {first}, so '<|s_{code}|>' should be "
                f"{first + code}, but is {known[f'<|s_{code}|>']}; add them with add_speech_tokens to a tokenizer "
                "that has none of them"
            )
    return SpeechVocabulary({marker: known[marker] for marker in MARKERS}, first, codebook_size, known[SPEECH_END])


def _resize(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, vocabulary: SpeechVocabulary, is_new: bool
) -> None:
    rows = embedding_rows(model)
    if rows >= len(tokenizer):
        return
    if hasattr(model, "peft_config"):
        raise ValueError(
            f"the model has adapters of PEFT, and {rows} embedding rows for {len(tokenizer)} tokens: "
            "call add_speech_tokens(..., model=model) before get_peft_model"
        )
    if not is_new and rows > vocabulary.first_code:  # a checkpoint of another codebook, or rows that pad a vocabulary
        raise ValueError(
            f"the model has {rows} embedding rows, fewer than the tokenizer's {len(tokenizer)} tokens, but some for "
            "codes: load model and tokenizer from the same checkpoint; if its rows are only padding, call "
            f"model.resize_token_embeddings({len(tokenizer)}) first"
        )
    if not is_new:
        logger.warning(
            "the tokenizer had its speech tokens and the model %d embedding rows, none of them for codes; the others up"
            " to %d are drawn at random, and must be trained: a model that was trained for speech has all of them",
            *(rows, len(tokenizer)),
        )
    model.resize_token_embeddings(len(tokenizer))


def _integers(name: str, values: Any) -> np.ndarray:
    array = np.asarray(values.cpu() if hasattr(values, "cpu") else values)
    if array.size == 0:
        return np.zeros(0, dtype=np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be a list of integers, got {array.dtype} of shape {array.shape}")
    return array.astype(np.int64)
