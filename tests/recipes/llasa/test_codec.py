"""Encoding and decoding with a tiny X-codec2 of random weights."""

import importlib.util

import numpy as np
import pytest
import torch

from hf_stablespam.recipes.llasa import decode_speech, encode_speech

transformers = pytest.importorskip("transformers")
if not hasattr(transformers, "Xcodec2Model"):
    pytest.skip("this transformers has no Xcodec2Model", allow_module_level=True)


def tiny_codec(levels: tuple[int, ...] = (4,) * 8):
    torch.manual_seed(0)
    semantic = transformers.Wav2Vec2BertConfig(
        **{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
        **{"feature_projection_input_dim": 160, "conv_depthwise_kernel_size": 3},
    )
    config = transformers.Xcodec2Config(
        **{"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        **{"num_key_value_heads": 2, "head_dim": 32, "encoder_hidden_size": 2, "quantization_dim": 80},
        semantic_model_config=semantic,
        quantization_levels=levels,
    )
    codec = transformers.Xcodec2Model(config).eval()
    with torch.no_grad():  # so that random weights give more than one code
        torch.nn.init.normal_(codec.fc_encoder.weight)
        torch.nn.init.normal_(codec.quantizer.project_in.weight)
    return codec


@pytest.fixture(scope="module")
def codec():
    return tiny_codec()


def noise(samples: int) -> np.ndarray:
    return (0.1 * np.random.default_rng(0).standard_normal(samples)).astype(np.float32)


@pytest.mark.parametrize("num_codes", [1, 50])
def test_a_code_is_320_samples(codec, num_codes):
    audio = decode_speech(codec, [65535, *range(num_codes - 1)])
    assert audio.shape == (320 * num_codes,)
    assert audio.dtype == np.float32
    assert np.isfinite(audio).all()


@pytest.mark.parametrize("samples", [320, 16000, 16001, 15999])
def test_there_are_as_many_codes_as_whole_frames(codec, samples):
    codes = encode_speech(codec, noise(samples), 16000)
    assert len(codes) == samples // 320
    assert all(0 <= code < 65536 for code in codes)


def test_arrays_tensors_and_lists_of_one_channel_are_equal(codec):
    audio = noise(3200)
    expected = encode_speech(codec, audio, 16000)
    for same in (audio[None], torch.from_numpy(audio), audio.astype(np.float64), audio.tolist()):
        assert encode_speech(codec, same, 16000) == expected


def test_codes_are_those_of_the_codecs_own_features(codec):
    """Against `Xcodec2FeatureExtractor`, which is what the model's documentation uses."""
    if importlib.util.find_spec("torchaudio") is None:
        pytest.skip(
            "Xcodec2FeatureExtractor needs torchaudio; its newest wheel, 2.11, does not load beside the CPU build "
            "of torch 2.13"
        )
    audio = noise(16001)
    inputs = transformers.Xcodec2FeatureExtractor()(audio, sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        codes = codec.encode(inputs["input_values"], inputs["input_features"]).audio_codes[0, 0]
    assert encode_speech(codec, audio, 16000) == codes[:50].tolist()


def test_other_audio_gives_other_codes(codec):
    assert encode_speech(codec, noise(6400), 16000) != encode_speech(codec, -noise(6400)[::-1].copy(), 16000)


@pytest.mark.parametrize(
    ("audio", "rate", "message"),
    [
        (noise(3200), 22050, r"sampling_rate must be 16000, got 22050; .*Audio\(sampling_rate=16000\)"),
        (noise(6400).reshape(2, -1), 16000, r"one channel.*got \(2, 3200\).*Audio\(sampling_rate=16000\)"),
        (np.zeros(3200, dtype=np.int16), 16000, "must be floating.*int16; divide"),
        (np.full(3200, np.nan), 16000, "must be finite"),
        (noise(319), 16000, "at least 320 samples, which give one code, got 319"),
    ],
)
def test_audio_that_the_codec_would_not_understand_is_refused(codec, audio, rate, message):
    with pytest.raises(ValueError, match=message):
        encode_speech(codec, audio, rate)


@pytest.mark.parametrize(("codes", "message"), [([], "codes must not be empty"), ([1, 65536], r"\[0, 65536\).*65536")])
def test_codes_that_cannot_be_decoded_are_refused(codec, codes, message):
    with pytest.raises(ValueError, match=message):
        decode_speech(codec, codes)
