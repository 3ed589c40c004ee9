"""Who speaks: espeak-ng in two voices, or, where it is not installed, tones that only resemble speech."""

from __future__ import annotations

import ctypes
import ctypes.util
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

SAMPLING_RATE = 16_000
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
VOICES = ("low", "high")
ESPEAK_VOICES = {"low": "en-us", "high": "en-us+f3"}

# text, voice, words a minute, pitch from 0 to 100 → samples at 16 kHz
Speaker = Callable[[str, str, int, int], np.ndarray]


@dataclass(frozen=True)
class Utterance:
    """Something that was said."""

    text: str
    voice: str
    audio: np.ndarray  # (samples,) at 16 kHz


def find_speaker() -> tuple[Speaker, str]:
    """Somebody who speaks, and what it is in words."""
    try:
        return Espeak(), "espeak-ng"
    except OSError as error:
        return tones, f"synthetic tones instead of speech, because espeak-ng was not found ({error})"


def record(speaker: Speaker, number: int, seed: int, num_words: int = 3) -> list[Utterance]:
    """Utterances of random digits, both voices in turn, with a little variety of tempo and pitch."""
    draw = random.Random(seed)
    utterances = []
    for i in range(number):
        text = " ".join(draw.choices(WORDS, k=num_words))
        voice = VOICES[i % len(VOICES)]
        audio = speaker(text, voice, draw.randint(180, 220), draw.randint(42, 58))
        utterances.append(Utterance(text, voice, audio))
    return utterances


class Espeak:
    """espeak-ng's library, from the wheel espeakng-loader or from the system.

    Raises:
        OSError: neither is there.
    """

    def __init__(self) -> None:
        library, data = _library()
        self._library = ctypes.CDLL(library)
        self._chunks: list[np.ndarray] = []
        synchronous, utf8_path = 2, data.encode() if data else None
        self._rate = self._library.espeak_Initialize(synchronous, 0, utf8_path, 0)
        if self._rate <= 0:
            raise OSError("espeak-ng found no voices")
        signature = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self._callback = signature(self._receive)  # kept: the library holds only its address
        self._library.espeak_SetSynthCallback(self._callback)

    def __call__(self, text: str, voice: str, rate: int, pitch: int) -> np.ndarray:
        self._chunks.clear()
        self._library.espeak_SetVoiceByName(ESPEAK_VOICES[voice].encode())
        for parameter, value in ((1, rate), (3, pitch)):
            self._library.espeak_SetParameter(parameter, value, 0)
        said, utf8 = text.encode() + b"\0", 1
        self._library.espeak_Synth(said, ctypes.c_size_t(len(said)), 0, 0, 0, utf8, None, None)
        self._library.espeak_Synchronize()
        return without_silence(resampled(np.concatenate(self._chunks) / 32768, self._rate))

    def _receive(self, samples: object, number: int, events: object) -> int:
        if samples and number > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, (number,)).astype(np.float32))
        return 0


def tones(text: str, voice: str, rate: int, pitch: int) -> np.ndarray:
    """Three pairs of tones for each word, higher in the high voice: no speech, but it can be told apart."""
    scale = (1.0 if voice == "low" else 1.5) * (1 + (pitch - 50) / 400)
    time = np.arange(int(SAMPLING_RATE * 18 / rate)) / SAMPLING_RATE
    sounds = []
    for word in text.split():
        draw = random.Random(word)
        for _ in range(3):
            first, second = draw.uniform(250, 900), draw.uniform(1000, 3000)
            wave = sum(np.sin(2 * np.pi * scale * f * time) / i for i, f in enumerate((first, second), 1))
            sounds.append(0.2 * wave * np.hanning(len(time)) ** 0.25)
    return np.concatenate(sounds).astype(np.float32)


def resampled(audio: np.ndarray, rate: int) -> np.ndarray:
    """To 16 kHz, by cutting off the spectrum above 8 kHz."""
    length = round(len(audio) * SAMPLING_RATE / rate)
    spectrum = np.fft.rfft(audio)[: length // 2 + 1]
    return (np.fft.irfft(spectrum, length) * length / len(audio)).astype(np.float32)


def without_silence(audio: np.ndarray, threshold: float = 0.01) -> np.ndarray:
    """From the first sound to the last, with a twentieth of a second around them."""
    loud = np.flatnonzero(np.abs(audio) > threshold)
    if len(loud) == 0:
        return audio
    margin = SAMPLING_RATE // 20
    return audio[max(0, loud[0] - margin) : loud[-1] + margin]


def _library() -> tuple[str, str | None]:
    """Path of the library, and of its data where it does not know them itself."""
    try:
        import espeakng_loader
    except ImportError:
        found = ctypes.util.find_library("espeak-ng")
        if found is None:
            raise OSError("install it with: pip install espeakng-loader, or apt install espeak-ng") from None
        return found, None
    return str(espeakng_loader.get_library_path()), str(espeakng_loader.get_data_path())
