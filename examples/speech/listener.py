"""Who listens: a small recogniser that hears which digits are said (CTC) and in which voice."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, ctc_loss, log_softmax, normalize
from torch.nn.utils.rnn import pad_sequence

from speech.voices import VOICES, WORDS

BLANK = len(WORDS)


class _Block(nn.Sequential):
    """Convolution over five frames, normalised over the channels."""

    def __init__(self, inputs: int, outputs: int, dilation: int) -> None:
        convolution = nn.Conv1d(inputs, outputs, 5, padding=2 * dilation, dilation=dilation)
        super().__init__(convolution, nn.GroupNorm(1, outputs), nn.ReLU())


class Listener(nn.Module):
    """Log-mel frames → words and voice.

    Args:
        mels: numbers of a frame.
        width: channels of its convolutions.
    """

    def __init__(self, mels: int, width: int = 64) -> None:
        super().__init__()
        self.front = nn.Sequential(_Block(mels, width, 1), _Block(width, width, 1))
        self.context = nn.Sequential(_Block(width, width, 2), _Block(width, width, 3))
        self.words = nn.Linear(width, len(WORDS) + 1)
        self.voice = nn.Linear(width, len(VOICES))

    def forward(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, frames, mels) → scores: of words, (batch, frames, words + 1), of voices, (batch, frames, voices)."""
        local = self.front(frames.transpose(1, 2))
        return self.words(self.context(local).transpose(1, 2)), self.voice(local.transpose(1, 2))

    def learn(self, heard: Sequence[tuple[np.ndarray, str, str]], steps: int, batch_size: int = 16) -> None:
        """Trains on (frames, text, voice), cut at random too, because unfinished speech has a voice as well."""
        draw = random.Random(torch.initial_seed())
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        for _ in range(steps):
            frames, texts, voices = zip(*draw.sample(heard, min(batch_size, len(heard))), strict=True)
            lengths = torch.tensor([len(f) for f in frames])
            words, voice = self(pad_sequence([self._normal(f) for f in frames], batch_first=True))
            targets = [torch.tensor([WORDS.index(word) for word in text.split()]) for text in texts]
            loss = ctc_loss(
                log_softmax(words, -1).transpose(0, 1),
                torch.cat(targets),
                lengths,
                torch.tensor([len(t) for t in targets]),
                blank=BLANK,
                zero_infinity=True,
            )
            inside = torch.arange(voice.shape[1]) < lengths[:, None]
            whose = torch.tensor([VOICES.index(v) for v in voices])[:, None].expand_as(inside)
            loss = loss + cross_entropy(voice[inside], whose[inside])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        self.eval()

    @torch.no_grad()
    def transcribe(self, many: Sequence[np.ndarray]) -> list[str]:
        """The words that are heard in each (frames, mels)."""
        texts = []
        for frames in many:
            best = self(self._normal(frames)[None])[0][0].argmax(-1).tolist()
            changes = [now for i, now in enumerate(best) if i == 0 or now != best[i - 1]]
            texts.append(" ".join(WORDS[word] for word in changes if word != BLANK))
        return texts

    @torch.no_grad()
    def voices(self, many: Sequence[np.ndarray]) -> torch.Tensor:
        """(utterances, voices): the share of frames that sound like each voice."""
        shares = [self(self._normal(frames)[None])[1][0].softmax(-1).mean(0) for frames in many]
        return normalize(torch.stack(shares), p=1, dim=-1)

    @staticmethod
    def _normal(frames: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(frames) / 4 + 1  # log energies lie between -9 and 1
