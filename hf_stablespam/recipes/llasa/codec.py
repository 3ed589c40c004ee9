"""Speech ↔ codes through `transformers.Xcodec2Model`: 16 kHz mono, 320 samples a code."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

_REMEDY = 'datasets.Audio(sampling_rate=16000) casts a column: dataset.cast_column("audio", Audio(sampling_rate=16000))'


@torch.no_grad()
def encode_speech(codec: Any, audio: Any, sampling_rate: int) -> list[int]:
    """Codes of speech: ``⌊samples / 320⌋`` of them, 50 a second.

    The mel features of the codec's semantic encoder are those of `SeamlessM4TFeatureExtractor`, in NumPy: what the
    codec was trained with, and equal to `Xcodec2FeatureExtractor`, which needs torchaudio, up to 1e-4.

    Args:
        codec: an `Xcodec2Model`, such as ``Xcodec2Model.from_pretrained("HKUSTAudio/xcodec2-hf")``.
        audio: samples of one channel, (samples,) or (1, samples), floating, in [−1, 1]; array, tensor or list.
        sampling_rate: samples a second of `audio`; the codec's, 16,000.

    Returns:
        The codes, for the column ``codes`` of `SpeechTokenCollator`'s rows.

    Raises:
        ValueError: another sampling rate, more channels than one, samples that are integers or not finite, or too few
            of them for a code.

    Example:
        >>> encode_speech(codec, row["audio"]["array"], row["audio"]["sampling_rate"])  # doctest: +SKIP
        [51713, 2087, ...]
    """
    from transformers import SeamlessM4TFeatureExtractor

    hop = codec.config.hop_length
    samples = _mono(audio, sampling_rate, codec.config.sampling_rate)
    num_codes = len(samples) // hop
    if num_codes == 0:
        raise ValueError(f"audio must have at least {hop} samples, which give one code, got {len(samples)}")
    # As Xcodec2FeatureExtractor pads: at least one sample, to whole frames; the mel frames are centred on them.
    padded = np.pad(samples, (0, hop - len(samples) % hop))
    features = SeamlessM4TFeatureExtractor(sampling_rate=sampling_rate)(
        np.pad(padded, hop // 2), sampling_rate=sampling_rate, padding=False, return_tensors="pt"
    )
    output = codec.encode(
        torch.from_numpy(padded)[None, None].to(codec.device, codec.dtype),
        features["input_features"].to(codec.device, codec.dtype),
    )
    return output.audio_codes[0, 0, :num_codes].tolist()


@torch.no_grad()
def decode_speech(codec: Any, codes: Sequence[int]) -> np.ndarray:
    """Speech of codes: 320 samples for each, at 16 kHz.

    Args:
        codec: an `Xcodec2Model`.
        codes: integers in [0, 65536), or below the product of the codec's `quantization_levels`.

    Returns:
        (320 · codes,) float32, in about [−1, 1]: for `soundfile.write("speech.wav", audio, 16000)`.

    Raises:
        ValueError: no codes, or one out of its range.

    Example:
        >>> audio = decode_speech(codec, best_of_n(model, prompt, verifier, vocabulary=v).codes)  # doctest: +SKIP
    """
    if len(codes) == 0:
        raise ValueError("codes must not be empty: there is no speech to decode")
    size = math.prod(codec.config.quantization_levels)
    wrong = [code for code in codes if not 0 <= code < size]
    if wrong:
        raise ValueError(f"a code must be in [0, {size}), the codec's codebook, got {wrong[0]}")
    audio = codec.decode(audio_codes=torch.tensor([[list(codes)]], device=codec.device)).audio_values
    return audio[0, 0].float().cpu().numpy()


def _mono(audio: Any, sampling_rate: int, wanted: int) -> np.ndarray:
    samples = np.asarray(audio.cpu() if hasattr(audio, "cpu") else audio)
    if sampling_rate != wanted:
        raise ValueError(f"sampling_rate must be {wanted}, got {sampling_rate}; {_REMEDY}")
    if samples.ndim == 2 and samples.shape[0] == 1:
        samples = samples[0]
    if samples.ndim != 1:
        raise ValueError(
            f"audio must be one channel, of shape (samples,), got {samples.shape}; take the mean over channels, or "
            f"mix down: {_REMEDY}"
        )
    if samples.dtype.kind != "f":
        raise ValueError(f"audio must be floating, in [−1, 1], got {samples.dtype}; divide 16-bit samples by 32768")
    if not np.isfinite(samples).all():
        raise ValueError("audio must be finite, but has nan or inf among its samples")
    return samples.astype(np.float32)
