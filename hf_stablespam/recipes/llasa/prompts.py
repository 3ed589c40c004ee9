"""The chat of a text and its speech: which tokens stand around the text and around the codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from hf_stablespam.recipes.llasa.vocabulary import (
    SPEECH_END,
    SPEECH_START,
    TEXT_END,
    TEXT_START,
    SpeechVocabulary,
    tokenizer_of,
)

INSTRUCTION = "Convert the text to speech:"
# Llama-3's template writes today's date unless it is told one; this is the day it falls back to.
DATE = "26 Jul 2024"


class Template(NamedTuple):
    """The chat's tokens but for text and codes: each piece includes the markers at its ends."""

    before_text: list[int]  # … TEXT_UNDERSTANDING_START
    before_codes: list[int]  # TEXT_UNDERSTANDING_END … SPEECH_GENERATION_START
    after_codes: list[int]  # SPEECH_GENERATION_END …


def speech_prompt(
    processing_class: Any,
    vocabulary: SpeechVocabulary,
    text: str,
    *,
    speaker: str | None = None,
    reference_text: str | None = None,
    reference_codes: Sequence[int] = (),
    instruction: str = INSTRUCTION,
) -> list[int]:
    """Token ids from which a model goes on with speech: the chat up to ``<|SPEECH_GENERATION_START|>``.

    The text is tokenized on its own and spliced between its markers, so that no merge crosses them. A template that
    writes a date gets a fixed one.

    Args:
        processing_class: tokenizer with a chat template, or a processor that holds one.
        vocabulary: what `add_speech_tokens` returned for it.
        text: what is to be said.
        speaker: what stands in front of the codes, such as ``"Speaker kore"``; default None.
        reference_text: what the reference voice says; it goes in front of `text`.
        reference_codes: codes of the reference voice; the model goes on after them.
        instruction: begin of the user's turn; default that of the released models.

    Returns:
        The ids, for `best_of_n`, `process_beam_search` or `model.generate`.

    Raises:
        ValueError: an empty text, one that holds a marker or another special token, a code out of its range, or a
            `reference_text` without `reference_codes`.

    Example:
        >>> speech_prompt(tokenizer, vocabulary, "Hello.", speaker="Speaker kore")  # doctest: +SKIP
        [128000, 128006, 882, ...]
    """
    template = chat_template(processing_class, vocabulary, instruction, speaker)
    return [
        *template.before_text,
        *text_ids(processing_class, vocabulary, text, reference_text, reference_codes),
        *template.before_codes,
        *vocabulary.encode(reference_codes),
    ]


def chat_template(
    processing_class: Any, vocabulary: SpeechVocabulary, instruction: str, speaker: str | None
) -> Template:
    """The tokens around text and codes, from the tokenizer's chat template."""
    for name, value in (("instruction", instruction), ("speaker", speaker)):
        if value is not None:
            plain_ids(processing_class, vocabulary, name, value)
    voice = f"{speaker.strip()} " if speaker else ""
    messages = [
        {"role": "user", "content": f"{instruction}{TEXT_START}{TEXT_END}"},
        {"role": "assistant", "content": f"{voice}{SPEECH_START}{SPEECH_END}"},
    ]
    ids: Any = tokenizer_of(processing_class).apply_chat_template(
        messages, tokenize=True, return_dict=False, date_string=DATE
    )
    places = [vocabulary.markers[marker] for marker in (TEXT_START, TEXT_END, SPEECH_START, SPEECH_END)]
    if [token for token in ids if token in places] != places:
        raise ValueError(
            "the chat template must keep both turns as they are, the user's and then the assistant's, each once; "
            f"between the markers it made {[token for token in ids if token in places]} of {places}"
        )
    text, codes = ids.index(places[1]), ids.index(places[3])
    return Template(ids[:text], ids[text:codes], ids[codes:])


def text_ids(
    processing_class: Any,
    vocabulary: SpeechVocabulary,
    text: str,
    reference_text: str | None,
    reference_codes: Sequence[int],
) -> list[int]:
    """Tokens between the text's markers: the reference voice's transcript, if there is one, and the text."""
    if reference_text is not None and len(reference_codes) == 0:
        raise ValueError("reference_text needs reference_codes: what is said there would else be spoken again")
    if not text.strip():
        raise ValueError(f"text must not be empty, got {text!r}")
    if reference_text is not None:
        text = f"{reference_text.strip()} {text}"
    return plain_ids(processing_class, vocabulary, "text", text)


def plain_ids(processing_class: Any, vocabulary: SpeechVocabulary, name: str, text: str) -> list[int]:
    """Tokens of a text in which nothing may be read as a marker, a code or another special token."""
    tokenizer = tokenizer_of(processing_class)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    special = {*tokenizer.all_special_ids, *vocabulary.markers.values()} - {tokenizer.unk_token_id}
    codes = range(vocabulary.first_code, vocabulary.first_code + vocabulary.codebook_size)
    for token in ids:
        if token in special or token in codes:
            raise ValueError(
                f"{name} must not contain {tokenizer.convert_ids_to_tokens(token)!r}, which would be read as a token "
                f"of its own; take it out of {text!r}"
            )
    return ids
