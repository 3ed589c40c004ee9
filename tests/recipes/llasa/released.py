"""Folders of tiny models with random weights, in the layout of the hub's."""

from pathlib import Path

import soundfile
import torch
from transformers import Wav2Vec2FeatureExtractor, WavLMConfig, WavLMForXVector

from hf_stablespam.recipes.llasa import add_speech_tokens
from tests.recipes.llasa.helpers import llama, text_tokenizer
from tests.recipes.llasa.test_codec import noise, tiny_codec
from tests.recipes.llasa.test_verifiers import SHAPE, recogniser


def write_codec_and_listeners(folder: Path, levels: tuple[int, ...] = (4,) * 8) -> None:
    """`codec`, `recogniser` and `speaker`, and `voice.wav`, half a second of noise at 16 kHz."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_codec(levels).save_pretrained(folder / "codec")
    asr = recogniser(folder)
    for part in (asr.model, asr.tokenizer, asr.feature_extractor):
        part.save_pretrained(folder / "recogniser")
    torch.manual_seed(0)
    WavLMForXVector(WavLMConfig(**SHAPE)).save_pretrained(folder / "speaker")
    Wav2Vec2FeatureExtractor().save_pretrained(folder / "speaker")
    soundfile.write(folder / "voice.wav", noise(8000), 16_000)


def write_llasa(folder: Path, codes: int) -> None:
    """`llasa`: a model and its tokenizer."""
    tokenizer, model = text_tokenizer(), llama(261)
    add_speech_tokens(tokenizer, codes, model=model)
    tokenizer.save_pretrained(folder / "llasa")
    model.save_pretrained(folder / "llasa")
