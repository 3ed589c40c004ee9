"""`SpeechTokenCollator`: rows of text and codes → a padded batch whose loss is the speech's."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from hf_stablespam.recipes.llasa.prompts import INSTRUCTION, Template, chat_template, text_ids
from hf_stablespam.recipes.llasa.vocabulary import SpeechVocabulary, tokenizer_of

logger = logging.getLogger(__name__)

IGNORED = -100


class SpeechTokenCollator:
    """Rows of text and codes → input ids, attention mask and labels of Llasa's training sequence.

    A row becomes a chat of two turns: the user's ``instruction`` and text, the assistant's codes between
    ``<|SPEECH_GENERATION_START|>`` and ``<|SPEECH_GENERATION_END|>``. The labels are the ids of that span, both markers
    included, and −100 elsewhere. The mask comes from the lengths, so a token of the text that equals the
    pad token stays visible. Use it with `TrainingArguments(remove_unused_columns=False)`.

    A row is a mapping with ``text`` (str) and ``codes`` (list of int), and if wanted ``speaker`` (str, in front of the
    codes, outside the loss), ``reference_text`` and ``reference_codes`` (a voice to go on with, outside the loss).

    Args:
        processing_class: tokenizer with a chat template and a pad token of its own, or a processor that holds one;
            its `padding_side` is used.
        vocabulary: what `add_speech_tokens` returned for it.
        max_length: tokens of a sequence, at most; default 2048 (train_tts.py).
        instruction: begin of the user's turn.
        truncation: ``"cut"`` (on the right, as official: such a row has no end) or ``"drop"`` (leave the row out).
        pad_to_multiple_of: the batch's length is a multiple of this, or `max_length`; None: the longest row's length.

    Attributes:
        num_cut: rows cut so far, in this process (a worker of the data loader counts its own).
        num_dropped: rows left out so far, likewise.

    Raises:
        ValueError: at construction: pad token missing or equal to the end-of-text token, a `max_length` that leaves no
            room for a code; in a call, with the row: empty text or codes, a code out of its range, a text with a
            marker, a prompt as long as `max_length`, or a batch of which every row was left out.

    Example:
        >>> collator = SpeechTokenCollator(tokenizer, vocabulary, max_length=512)  # doctest: +SKIP
        >>> Trainer(model, args, train_dataset=data, data_collator=collator).train()  # doctest: +SKIP
    """

    def __init__(
        self,
        processing_class: Any,
        vocabulary: SpeechVocabulary,
        max_length: int = 2048,
        instruction: str = INSTRUCTION,
        truncation: Literal["cut", "drop"] = "cut",
        pad_to_multiple_of: int | None = 8,
    ) -> None:
        if truncation not in ("cut", "drop"):
            raise ValueError(f'truncation must be "cut" or "drop", got {truncation!r}')
        if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of must be None or at least 1, got {pad_to_multiple_of}")
        self.tokenizer = tokenizer_of(processing_class)
        check_pad_token(self.tokenizer)
        self.vocabulary = vocabulary
        self.max_length = max_length
        self.instruction = instruction
        self.truncation = truncation
        self.pad_to_multiple_of = pad_to_multiple_of
        self.num_cut = 0
        self.num_dropped = 0
        self._templates: dict[str | None, Template] = {}
        template = self._template(None)
        shortest = len(template.before_text) + len(template.before_codes)
        if max_length <= shortest:
            raise ValueError(
                f"max_length must be above the prompt's {shortest} tokens (without any text), got {max_length}: "
                "no code would be trained"
            )

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """The batch: ``input_ids``, ``attention_mask`` and ``labels``, each (rows, tokens) of int64."""
        sequences = [sequence for i, row in enumerate(rows) if (sequence := self._sequence(i, row)) is not None]
        if not sequences:
            raise ValueError(
                f'every row of a batch of {len(rows)} is longer than max_length={self.max_length} and truncation="drop"'
                ' left it out: raise max_length, take truncation="cut", or filter the data set'
            )
        multiple = self.pad_to_multiple_of or 1
        longest = max(len(ids) for ids, _ in sequences)
        length = max(longest, min(self.max_length, -(-longest // multiple) * multiple))
        left = self.tokenizer.padding_side == "left"

        def padded(values: list[int], filler: int) -> list[int]:
            padding = [filler] * (length - len(values))
            return padding + values if left else values + padding

        return {
            "input_ids": torch.tensor([padded(ids, self.tokenizer.pad_token_id) for ids, _ in sequences]),
            "attention_mask": torch.tensor([padded([1] * len(ids), 0) for ids, _ in sequences]),
            "labels": torch.tensor([padded(labels, IGNORED) for _, labels in sequences]),
        }

    def _sequence(self, index: int, row: Mapping[str, Any]) -> tuple[list[int], list[int]] | None:
        """Ids and labels of one row; None where it is left out."""
        try:
            prompt, reference, codes, after = self._pieces(row)
        except ValueError as error:
            raise ValueError(f"row {index} of the batch: {error}") from error
        ids = [*prompt, *reference, *codes, *after]
        # The start marker, the codes and the end marker; not the reference's codes, nor the chat's own end of turn.
        labels = [
            *[IGNORED] * (len(prompt) - 1),
            prompt[-1],
            *[IGNORED] * len(reference),
            *codes,
            after[0],
            *[IGNORED] * (len(after) - 1),
        ]
        needed = len(ids) - len(after) + 1  # up to the end marker; what follows it may be cut without a loss
        if needed > self.max_length:
            if self.truncation == "drop":
                self._count("num_dropped", "left out")
                return None
            if len(prompt) + len(reference) >= self.max_length:
                raise ValueError(
                    f"row {index} of the batch: max_length={self.max_length} is not above its prompt's "
                    f"{len(prompt) + len(reference)} tokens, so no code would be trained; raise it"
                )
            self._count("num_cut", "cut, so that their speech has no end,")
        return ids[: self.max_length], labels[: self.max_length]

    def _pieces(self, row: Mapping[str, Any]) -> tuple[list[int], list[int], list[int], list[int]]:
        """Prompt up to the start marker, reference codes, codes, and the end marker with what follows."""
        for name in ("text", "codes"):
            if row.get(name) is None:
                raise ValueError(
                    f'a row needs "text" and "codes", but has {sorted(row)}; set remove_unused_columns=False'
                )
        if len(row["codes"]) == 0:
            raise ValueError("codes must not be empty: take the row out, or encode its audio anew")
        reference = row.get("reference_codes")
        reference = [] if reference is None else reference
        template = self._template(row.get("speaker"))
        text = text_ids(self.tokenizer, self.vocabulary, row["text"], row.get("reference_text"), reference)
        prompt = [*template.before_text, *text, *template.before_codes]
        return prompt, self.vocabulary.encode(reference), self.vocabulary.encode(row["codes"]), template.after_codes

    def _template(self, speaker: str | None) -> Template:
        """Kept for each speaker: a chat template is rendered once, not once for each row."""
        if speaker not in self._templates:
            self._templates[speaker] = chat_template(self.tokenizer, self.vocabulary, self.instruction, speaker)
        return self._templates[speaker]

    def _count(self, counter: str, what: str) -> None:
        if getattr(self, counter) == 0:
            logger.warning(
                "rows longer than max_length=%d are %s; the collator's %s counts them", self.max_length, what, counter
            )
        setattr(self, counter, getattr(self, counter) + 1)


def check_pad_token(tokenizer: Any) -> None:
    """Raises ValueError where padding cannot be told from the end of a turn."""
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        found = "there is none" if tokenizer.pad_token_id is None else f"it is {tokenizer.eos_token!r}, the eos_token"
        raise ValueError(
            f"pad_token must be a token of its own, but {found}: set one, such as "
            'tokenizer.pad_token = "<|finetune_right_pad_id|>" for Llama-3'
        )
