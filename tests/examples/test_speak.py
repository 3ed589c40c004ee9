"""The speaking example in a few steps, without espeak, and with released models that are tiny and random."""

import sys

import numpy as np
import pytest
import soundfile
import speak
from speech import voices
from speech.codec import log_mel
from speech.studio import Sizes, build

from tests.recipes.llasa.released import write_codec_and_listeners, write_llasa


def test_it_speaks_writes_sound_and_draws(tmp_path, capsys):
    speak.main(["--output_dir", str(tmp_path), "--smoke", "--four_bit", "int4", "--disable_tqdm", "True"])
    shown = capsys.readouterr().out
    assert "process search to 12 codes, then content" in shown
    assert (tmp_path / "speak.png").stat().st_size > 10_000
    for name in ("target", "one_sample", "best_of_16_content", "process_search_to_12_codes_then_content"):
        audio, rate = soundfile.read(tmp_path / f"{name}.wav")
        assert rate == 16_000
        assert len(audio) >= 320
        assert 0 < np.abs(audio).max() <= 1


def test_without_espeak_it_says_so_and_sounds_all_the_same(monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    monkeypatch.setattr(voices.ctypes.util, "find_library", lambda name: None)
    speaker, source = voices.find_speaker()
    assert source.startswith("synthetic tones instead of speech")
    assert "pip install espeakng-loader" in source
    low, high = speaker("one two", "low", 200, 50), speaker("one two", "high", 200, 50)
    assert np.array_equal(low, speaker("one two", "low", 200, 50))
    centre = [np.average(np.arange(64), weights=np.exp(log_mel(audio)).mean(0)) for audio in (low, high)]
    assert centre[1] > centre[0] + 3


@pytest.mark.slow
def test_listeners_hear_words_and_voices():
    studio = build(0, Sizes(recordings=60, codes=64, verifier=(120, 260), judge=(2, 1), tests=10))
    codes = [studio.codec.encode(test.audio) for test in studio.tests]
    scores = [studio.content_verifier(test.text)([c])[0] for test, c in zip(studio.tests, codes, strict=True)]
    assert sum(scores) / len(scores) > -0.3
    for test, c in zip(studio.tests, codes, strict=True):
        low, high = (studio.voice_verifier(voice)([c[:12]])[0] for voice in ("low", "high"))
        assert (low > high) == (test.voice == "low")


@pytest.fixture
def released(tmp_path):
    """The options that name folders of tiny models with random weights instead of the hub's."""
    write_codec_and_listeners(tmp_path, levels=(4, 4, 2))
    write_llasa(tmp_path, codes=32)
    folders = {name: name for name in ("llasa", "codec", "recogniser", "speaker")} | {"judge": "recogniser"}
    return [word for option, name in folders.items() for word in (f"--{option}_name", str(tmp_path / name))]


@pytest.mark.parametrize("with_voice", [True, False])
def test_released_models_are_loaded_searched_and_judged(tmp_path, released, capsys, with_voice):
    voice = ["--reference", str(tmp_path / "voice.wav"), "--reference_text", "one"] if with_voice else []
    limits = ["--candidates", "4", "--until", "20", "--max_codes", "40"]
    speak.main(["--output_dir", str(tmp_path / "out"), "--released", "--text", "ab", *released, *voice, *limits])
    shown = capsys.readouterr().out
    assert shown.count("of the words wrong, the judge hears") == 2
    assert ("similarity to the voice" in shown) == with_voice
    name = "process_search" if with_voice else "best_of_n"
    audio, rate = soundfile.read(tmp_path / "out" / f"{name}.wav")
    assert rate == 16_000
    assert 320 <= len(audio) <= 320 * 40
