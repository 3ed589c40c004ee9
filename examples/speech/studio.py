"""Everything that examples/speak.py and its benchmark need before a model is trained, made from one seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_stablespam.recipes.llasa import (
    SpeakerSimilarityVerifier,
    SpeechVocabulary,
    WordErrorVerifier,
    add_speech_tokens,
)
from speech.codec import MELS, MelCodec, log_mel
from speech.listener import Listener
from speech.voices import VOICES, WORDS, Utterance, find_speaker, record

# Llama-3's layout in a few tokens, so that a CPU has little to read.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}{% endfor %}"
)
INSTRUCTION = "say"


@dataclass(frozen=True)
class Sizes:
    """How much is recorded and learned."""

    recordings: int = 600
    codes: int = 64
    verifier: tuple[int, int] = (400, 400)  # utterances, steps
    judge: tuple[int, int] = (200, 400)
    tests: int = 20
    max_codes: int = 96  # of an utterance that is generated


@dataclass
class Studio:
    """Speech, its codes, and two listeners who never heard the same recordings."""

    source: str
    codec: MelCodec
    recordings: list[Utterance]
    references: dict[str, list[int]]  # codes of one utterance of each voice
    tests: list[Utterance]  # of texts that nobody has heard before
    verifier: Listener
    judge: Listener
    tokenizer: PreTrainedTokenizerFast
    vocabulary: SpeechVocabulary
    max_codes: int

    def rows(self) -> list[dict]:
        """Rows for `SpeechTokenCollator`. They do not say which voice speaks, so a trained model takes either."""
        return [{"text": u.text, "codes": self.codec.encode(u.audio)} for u in self.recordings]

    def content_verifier(self, text: str) -> WordErrorVerifier:
        """Scores candidates by what the verifier hears; it reads the codes' mels."""
        return WordErrorVerifier(lambda many: self.verifier.transcribe(self._mels(many)), text)

    def voice_verifier(self, voice: str) -> SpeakerSimilarityVerifier:
        """Scores candidates, finished or not, by how much they sound like the reference."""
        return SpeakerSimilarityVerifier(
            lambda many: self.verifier.voices(self._mels(many)), reference=self.references[voice]
        )

    def judged(self, codes: Sequence[int], text: str, voice: str) -> dict[str, float]:
        """What the judge hears in the audio: share of wrong words, and of frames in the voice that was asked for."""
        heard = [log_mel(self.codec(codes))]
        return {
            "error": WordErrorVerifier(self.judge.transcribe, text).error(self.judge.transcribe(heard)[0]),
            "voice": float(self.judge.voices(heard)[0, VOICES.index(voice)]),
        }

    def _mels(self, many: Sequence[Sequence[int]]) -> list[np.ndarray]:
        return [self.codec.mels(codes) for codes in many]


def build(seed: int, sizes: Sizes) -> Studio:
    """Records, learns the codebook, and trains verifier and judge, each on recordings of its own."""
    torch.manual_seed(seed)
    speaker, source = find_speaker()
    recordings = record(speaker, sizes.recordings, 10 * seed)
    codec = MelCodec(np.concatenate([log_mel(u.audio) for u in recordings]), sizes.codes)
    listeners = []
    for i, (number, steps) in enumerate((sizes.verifier, sizes.judge), 1):
        heard = record(speaker, number, 10 * seed + i)
        codes = [codec.encode(u.audio) for u in heard]
        # The verifier reads codes, before there is any sound; the judge hears what a person would hear.
        frames = [codec.mels(c) if i == 1 else log_mel(codec(c)) for c in codes]
        listener = Listener(MELS)
        listener.learn([(f, u.text, u.voice) for f, u in zip(frames, heard, strict=True)], steps)
        listeners.append(listener)
    known = {u.text for u in recordings}
    tests = [u for u in record(speaker, 4 * sizes.tests, 10 * seed + 3) if u.text not in known][: sizes.tests]
    references = {u.voice: codec.encode(u.audio) for u in record(speaker, len(VOICES), 10 * seed + 4)}
    tokenizer = word_tokenizer()
    vocabulary = add_speech_tokens(tokenizer, sizes.codes)
    return Studio(source, codec, recordings, references, tests, *listeners, tokenizer, vocabulary, sizes.max_codes)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """The digits, the instruction, and what a chat needs."""
    special = ["<|pad|>", "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>"]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, INSTRUCTION, *WORDS])}))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<|pad|>", bos_token="<|begin|>", eos_token="<|end|>"
    )
    tokenizer.add_tokens(special[3:], special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def small_llama(studio: Studio, hidden_size: int = 96, layers: int = 3) -> LlamaForCausalLM:
    """With random weights, from the global seed."""
    config = LlamaConfig(
        vocab_size=len(studio.tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=studio.tokenizer.bos_token_id,
        eos_token_id=studio.tokenizer.eos_token_id,
        pad_token_id=studio.tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)
