"""Verifiers: models that understand speech score candidates that another model wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from hf_stablespam.recipes.llasa.codec import decode_speech
from hf_stablespam.recipes.llasa.selection import Verifier

SAMPLING_RATE = 16000


class WordErrorVerifier:
    """Minus the word error rate of what a recogniser hears: −(substitutions + deletions + insertions) / words.

    Args:
        asr_pipeline: `pipeline("automatic-speech-recognition", ...)`, or a callable that takes a list of inputs and
            returns for each a text or ``{"text": ...}``.
        text: what was to be said.
        codec: makes audio of codes: an `Xcodec2Model`, or a callable of one list of codes. Default None: the
            recogniser hears the codes themselves.
        unit: ``"word"``, or ``"character"`` for languages that write no spaces.
        normalize: applied to both texts; default None: Whisper's basic normalizer (lower case, no punctuation).
        sampling_rate: of the codec's audio.

    Raises:
        ImportError: jiwer is not installed (extra ``speech``).
        ValueError: a text of which the normalizer leaves nothing, an unknown unit.

    Example:
        >>> heard = WordErrorVerifier(lambda inputs: ["hello word"] * len(inputs), "Hello, world!")
        >>> heard([[1, 2, 3]])
        [-0.5]
    """

    def __init__(
        self,
        asr_pipeline: Callable[..., Any],
        text: str,
        *,
        codec: Any = None,
        unit: Literal["word", "character"] = "word",
        normalize: Callable[[str], str] | None = None,
        sampling_rate: int = SAMPLING_RATE,
    ) -> None:
        if unit not in ("word", "character"):
            raise ValueError(f'unit must be "word" or "character", got {unit!r}')
        _jiwer()
        self.asr_pipeline = asr_pipeline
        self.codec = codec
        self.unit = unit
        self.normalize = normalize or _basic_normalizer()
        self.sampling_rate = sampling_rate
        self.text = self.normalize(text).strip()
        if not self.text:
            raise ValueError(f"text must hold a word to compare with, got {text!r}, of which normalize leaves nothing")

    def __call__(self, codes: list[list[int]]) -> list[float]:
        """Scores of candidates, each at most 0."""
        return [-self.error(text) for text in self.transcribe(codes)]

    def transcribe(self, codes: list[list[int]]) -> list[str]:
        """What the recogniser hears in each candidate."""
        if self.codec is None:
            heard = self.asr_pipeline(codes)
        else:
            audio = [_audio(self.codec, candidate) for candidate in codes]
            heard = self.asr_pipeline([{"raw": a, "sampling_rate": self.sampling_rate} for a in audio])
        return [answer["text"] if isinstance(answer, Mapping) else answer for answer in heard]

    def error(self, heard: str) -> float:
        """The error rate of one transcript, 0 or above."""
        measure = _jiwer().wer if self.unit == "word" else _jiwer().cer
        return float(measure(self.text, self.normalize(heard).strip()))


class SpeakerSimilarityVerifier:
    """Cosine similarity of a candidate's voice and a reference's, by a speaker encoder: in [−1, 1].

    It works on unfinished speech, so it suits a process reward.

    Args:
        xvector_model: a model with an x-vector head, such as `WavLMForXVector`, or a callable that takes a list of
            inputs and returns an embedding of each, (inputs, dimensions).
        reference: audio of the wanted voice, (samples,) at `sampling_rate`; for a callable without `codec`, whatever it
            takes.
        codec: makes audio of codes: an `Xcodec2Model`, or a callable of one list of codes. Default None, for a callable
            that judges the codes themselves.
        feature_extractor: of the model; default None: the one saved with it.
        sampling_rate: of the audio.

    Raises:
        ValueError: a model of transformers without `codec`.

    Example:
        >>> share = lambda inputs: [[sum(c < 32 for c in codes), sum(c >= 32 for c in codes)] for codes in inputs]
        >>> SpeakerSimilarityVerifier(share, reference=[1, 2, 3])([[4, 5], [40, 50]])
        [1.0, 0.0]
    """

    def __init__(
        self,
        xvector_model: Any,
        reference: Any,
        *,
        codec: Any = None,
        feature_extractor: Any = None,
        sampling_rate: int = SAMPLING_RATE,
    ) -> None:
        self.codec = codec
        self.embed = xvector_model
        if hasattr(xvector_model, "config"):
            if codec is None:
                raise ValueError("codec must be given for a model that hears audio: the Xcodec2Model of the codes")
            self.embed = _XVectors(xvector_model, feature_extractor, sampling_rate)
        self.reference = self._directions([reference])[0]

    def __call__(self, codes: list[list[int]]) -> list[float]:
        """Scores of candidates."""
        inputs = codes if self.codec is None else [_audio(self.codec, candidate) for candidate in codes]
        return (self._directions(inputs) @ self.reference).tolist()

    def _directions(self, inputs: Sequence[Any]) -> torch.Tensor:
        """(inputs, dimensions): embeddings of length 1."""
        embeddings = torch.as_tensor(self.embed(inputs)).double().cpu()
        return torch.nn.functional.normalize(embeddings, dim=-1)


def combine(weights: Mapping[Verifier, float] | Iterable[tuple[Verifier, float]]) -> Verifier:
    """A verifier that scores by the weighted sum of others: ``Σ weight · score``.

    Args:
        weights: weight of each verifier: a mapping, or pairs. A weight may be negative.

    Returns:
        The verifier; it asks each of the others once for all candidates.

    Raises:
        ValueError: no verifier; in a call, another number of scores than candidates from one of them.

    Example:
        >>> verifier = combine([(lambda codes: [len(c) for c in codes], 2.0), (lambda codes: [1.0] * len(codes), 0.5)])
        >>> verifier([[7, 7], [7]])
        [4.5, 2.5]
    """
    pairs = list(weights.items()) if isinstance(weights, Mapping) else list(weights)
    if not pairs:
        raise ValueError("weights must name at least one verifier")

    def combined(codes: list[list[int]]) -> list[float]:
        totals = [0.0] * len(codes)
        for verifier, weight in pairs:
            scores = list(verifier(codes))
            if len(scores) != len(codes):
                raise ValueError(
                    f"a verifier must return one score for each candidate: {verifier!r} gave {len(scores)} "
                    f"for {len(codes)}"
                )
            totals = [total + weight * float(score) for total, score in zip(totals, scores, strict=True)]
        return totals

    return combined


class _XVectors:
    """Embeddings of audio by a model of transformers, one utterance at a time, so that no padding is heard."""

    def __init__(self, model: Any, feature_extractor: Any, sampling_rate: int) -> None:
        if feature_extractor is None:
            from transformers import AutoFeatureExtractor

            feature_extractor = AutoFeatureExtractor.from_pretrained(model.config.name_or_path)
        self.model = model.eval()
        self.feature_extractor = feature_extractor
        self.sampling_rate = sampling_rate

    @torch.no_grad()
    def __call__(self, audio: Sequence[np.ndarray]) -> torch.Tensor:
        return torch.stack([self._embedding(one) for one in audio])

    def _embedding(self, audio: Any) -> torch.Tensor:
        audio = np.asarray(audio, dtype=np.float32)
        # The convolutions of x-vectors need some frames; half a second of silence and speech is enough for all.
        audio = np.pad(audio, (0, max(0, self.sampling_rate // 2 - len(audio))))
        inputs = self.feature_extractor(audio, sampling_rate=self.sampling_rate, return_tensors="pt")
        return self.model(**inputs.to(self.model.device, self.model.dtype)).embeddings[0].float()


def _audio(codec: Any, codes: Sequence[int]) -> np.ndarray:
    return decode_speech(codec, codes) if hasattr(codec, "config") else np.asarray(codec(codes), dtype=np.float32)


def _basic_normalizer() -> Callable[[str], str]:
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer

    return BasicTextNormalizer()


def _jiwer() -> Any:
    try:
        import jiwer
    except ImportError as error:
        raise ImportError(
            "word error rates are jiwer's, which is not installed: pip install 'hf_stablespam[speech]'"
        ) from error
    return jiwer
