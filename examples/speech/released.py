"""The released models: Llasa speaks with X-codec2, WavLM and Whisper choose, another Whisper judges."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import soundfile
import torch
from transformers import AutoModelForAudioXVector, AutoModelForCausalLM, AutoTokenizer, pipeline

from hf_stablespam.recipes.llasa import (
    SpeakerSimilarityVerifier,
    WordErrorVerifier,
    add_speech_tokens,
    best_of_n,
    decode_speech,
    encode_speech,
    process_beam_search,
    speech_prompt,
)
from speech.voices import SAMPLING_RATE


@dataclass
class Released:
    released: bool = field(default=False, metadata={"help": "Speak with the released models; trains nothing."})
    text: str = field(default="Hello from the Llama.", metadata={"help": "What is to be said."})
    reference: str | None = field(default=None, metadata={"help": "WAV file, 16 kHz mono: the voice to speak in."})
    reference_text: str | None = field(default=None, metadata={"help": "What is said in it."})
    llasa_name: str = field(default="HKUSTAudio/Llasa-1B", metadata={"help": "Hub name or folder, also 3B and 8B."})
    codec_name: str = field(default="HKUSTAudio/xcodec2-hf", metadata={"help": "X-codec2 for transformers."})
    recogniser_name: str = field(default="openai/whisper-large-v3", metadata={"help": "Verifier of the words."})
    speaker_name: str = field(default="microsoft/wavlm-base-plus-sv", metadata={"help": "Verifier of the voice."})
    judge_name: str = field(default="openai/whisper-medium", metadata={"help": "Who hears the result."})
    candidates: int = field(default=16, metadata={"help": "Samples, or continuations in each step of the search."})
    until: int = field(default=100, metadata={"help": "Codes for which the voice is searched, then the words."})
    max_codes: int = field(default=1500, metadata={"help": "Codes of an utterance, at most; 50 are a second."})


def load_llasa(options: Released) -> tuple[Any, Any, Any, Any]:
    """Model, tokenizer, vocabulary and codec; raises ValueError where they do not agree."""
    from transformers import Xcodec2Model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    codec = Xcodec2Model.from_pretrained(options.codec_name).eval().to(device)
    tokenizer = AutoTokenizer.from_pretrained(options.llasa_name)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(options.llasa_name, dtype=dtype).eval().to(device)
    codes = math.prod(codec.config.quantization_levels)
    return model, tokenizer, add_speech_tokens(tokenizer, codes, model=model), codec


def speak_with_released_models(options: Released, output: Path) -> None:
    """Writes one sample and the search's choice as WAV files, and prints what the judge hears in them."""
    model, tokenizer, vocabulary, codec = load_llasa(options)
    recogniser = pipeline("automatic-speech-recognition", model=options.recogniser_name, device=model.device)
    content = WordErrorVerifier(recogniser, options.text, codec=codec)
    limits = {"vocabulary": vocabulary, "max_new_tokens": options.max_codes}
    prompt_options, voice = {}, None
    if options.reference is not None:
        audio, rate = soundfile.read(options.reference, dtype="float32")
        codes = encode_speech(codec, audio, rate)
        prompt_options = {"reference_text": options.reference_text, "reference_codes": codes}
        speaker_encoder = AutoModelForAudioXVector.from_pretrained(options.speaker_name).to(model.device)
        voice = SpeakerSimilarityVerifier(speaker_encoder, audio, codec=codec)
    prompt = speech_prompt(tokenizer, vocabulary, options.text, **prompt_options)

    found = {"one_sample": best_of_n(model, prompt, content, 1, **limits)}
    if voice is None:
        found["best_of_n"] = best_of_n(model, prompt, content, options.candidates, **limits)
    else:
        width = max(1, math.isqrt(options.candidates))
        search = {"beam_width": width, "expansions": width, "until": options.until, "final_verifier": content}
        found["process_search"] = process_beam_search(model, prompt, voice, **search, **limits)

    judge = pipeline("automatic-speech-recognition", model=options.judge_name, device=model.device)
    for name, result in found.items():
        path = output / f"{name}.wav"
        soundfile.write(path, decode_speech(codec, result.codes), SAMPLING_RATE)
        verdict = WordErrorVerifier(judge, options.text, codec=codec)
        heard = verdict.transcribe([result.codes])[0]
        similarity = "" if voice is None else f", similarity to the voice {voice([result.codes])[0]:.3f}"
        print(f"{path}: {verdict.error(heard):.1%} of the words wrong, the judge hears {heard!r}{similarity}")
