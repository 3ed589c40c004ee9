"""A codec that is made on the spot: k-means over log-mel frames, and back by Griffin and Lim's algorithm."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from speech.voices import SAMPLING_RATE

HOP, FFT, MELS = 320, 1024, 64  # 50 frames a second, as X-codec2 has codes
FLOOR = 1e-4
FILTERS = mel_filter_bank(FFT // 2 + 1, MELS, 50.0, 7600.0, SAMPLING_RATE, norm="slaney", mel_scale="slaney")
WINDOW = window_function(FFT, "hann")


def log_mel(audio: np.ndarray) -> np.ndarray:
    """(frames, mels): log-mel energies of (samples,) at 16 kHz, a frame for every 320 samples."""
    padded = np.pad(audio, (FFT // 2, FFT // 2))
    mels = spectrogram(
        padded, WINDOW, FFT, HOP, power=1.0, center=False, mel_filters=FILTERS, mel_floor=FLOOR, log_mel="log"
    )
    return mels.T[: len(audio) // HOP].astype(np.float32)


class MelCodec:
    """One codebook over log-mel frames: one code for every 320 samples.

    Args:
        frames: (frames, mels) to learn the codebook from.
        size: codes.
        iterations: of k-means.
    """

    def __init__(self, frames: np.ndarray, size: int, iterations: int = 30) -> None:
        points = torch.from_numpy(frames)
        self.centroids = points[torch.randperm(len(points))[:size]].clone()  # (codes, mels)
        for _ in range(iterations):
            nearest = torch.cdist(points, self.centroids).argmin(1)
            sums = torch.zeros_like(self.centroids).index_add_(0, nearest, points)
            counts = torch.bincount(nearest, minlength=size).unsqueeze(1)
            self.centroids = torch.where(counts > 0, sums / counts.clamp(min=1), self.centroids)
        self._from_mels = np.linalg.pinv(FILTERS.T)  # (frequencies, mels)

    def encode(self, audio: np.ndarray) -> list[int]:
        """The code of each frame: its nearest centroid."""
        return torch.cdist(torch.from_numpy(log_mel(audio)), self.centroids).argmin(1).tolist()

    def mels(self, codes: Sequence[int]) -> np.ndarray:
        """(frames, mels) of codes."""
        return self.centroids[list(codes)].numpy()

    def __call__(self, codes: Sequence[int]) -> np.ndarray:
        """Audio of codes, 320 samples each."""
        magnitudes = np.maximum(self._from_mels @ np.exp(self.mels(codes)).T, 0)
        return griffin_lim(torch.from_numpy(magnitudes.astype(np.float32)))[: HOP * len(codes)]


def griffin_lim(magnitudes: torch.Tensor, iterations: int = 12) -> np.ndarray:
    """Audio whose short-time spectrum has these magnitudes, (frequencies, frames); the phases are found in turns."""
    options = {"n_fft": FFT, "hop_length": HOP, "window": torch.hann_window(FFT)}
    length = HOP * magnitudes.shape[1]
    spectrum = torch.polar(magnitudes, 2 * torch.pi * torch.rand_like(magnitudes))
    for _ in range(iterations):
        audio = torch.istft(spectrum, length=length, **options)
        again = torch.stft(audio, return_complex=True, **options)[:, : magnitudes.shape[1]]
        spectrum = torch.polar(magnitudes, again.angle())
    return torch.istft(spectrum, length=length, **options).numpy()
