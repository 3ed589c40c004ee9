"""Verifiers on tiny models of transformers with random weights, and on callables."""

import sys

import numpy as np
import pytest
import torch
from transformers import (
    AutomaticSpeechRecognitionPipeline,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    WavLMConfig,
    WavLMForXVector,
)

from hf_stablespam.recipes.llasa import SpeakerSimilarityVerifier, WordErrorVerifier, combine
from tests.recipes.llasa.test_codec import tiny_codec

SHAPE = {
    **{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
    **{"conv_dim": (8, 8, 8), "conv_kernel": (10, 8, 4), "conv_stride": (5, 8, 8), "num_feat_extract_layers": 3},
    **{"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
}


def tone(codes) -> np.ndarray:
    """A codec of one's own: each code 320 samples of a tone."""
    time = np.arange(320 * len(codes)) / 16000
    return np.sin(2 * np.pi * np.repeat(200 + 40 * np.array(codes), 320) * time)


def hears(*texts):
    return lambda inputs: [{"text": text} for text in texts[: len(inputs)]]


@pytest.mark.parametrize(
    ("heard", "error"),
    [
        ("Hello, World.", 0),
        ("hello word", 0.5),
        ("hello", 0.5),
        ("hello the whole world", 1),
        ("", 1),
        ("a b c d e", 2.5),
    ],
)
def test_the_error_is_that_of_words(heard, error):
    assert WordErrorVerifier(hears(heard), "hello world!")([[1]]) == [-error]


def test_the_error_of_characters():
    assert WordErrorVerifier(hears("你号吗"), "你好吗", unit="character")([[1]]) == [pytest.approx(-1 / 3)]


def test_an_own_normalizer_and_plain_texts():
    verifier = WordErrorVerifier(lambda inputs: ["A b"] * len(inputs), "a b", normalize=str)
    assert verifier([[1], [2]]) == [-0.5, -0.5]


def test_wrong_texts_and_units_are_refused():
    with pytest.raises(ValueError, match=r"text must hold a word to compare with, got '\?!'"):
        WordErrorVerifier(hears(""), "?!")
    with pytest.raises(ValueError, match='unit must be "word" or "character", got \'letter\''):
        WordErrorVerifier(hears(""), "a", unit="letter")


def test_without_jiwer_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "jiwer", None)
    with pytest.raises(ImportError, match=r"pip install 'hf_stablespam\[speech\]'"):
        WordErrorVerifier(hears(""), "a")


def recogniser(folder) -> AutomaticSpeechRecognitionPipeline:
    """wav2vec 2.0 with random weights."""
    torch.manual_seed(0)
    vocabulary = folder / "vocab.json"
    vocabulary.write_text('{"<pad>": 0, "<unk>": 1, "|": 2, "a": 3, "b": 4, "c": 5}')
    tokenizer = Wav2Vec2CTCTokenizer(str(vocabulary))
    model = Wav2Vec2ForCTC(Wav2Vec2Config(vocab_size=6, **SHAPE)).eval()
    return AutomaticSpeechRecognitionPipeline(
        model, tokenizer=tokenizer, feature_extractor=Wav2Vec2FeatureExtractor(), device="cpu"
    )


@pytest.mark.parametrize("codec", [tone, tiny_codec()], ids=["callable", "Xcodec2Model"])
def test_a_pipeline_of_transformers_hears_the_audio(tmp_path, codec):
    candidates = [[1, 20, 3] * 9, [30, 7] * 20]
    asr = recogniser(tmp_path)
    verifier = WordErrorVerifier(asr, "ab c", codec=codec)
    heard = verifier.transcribe(candidates)
    assert len(heard) == 2
    assert verifier(candidates) == [-verifier.error(text) for text in heard]
    exactly = WordErrorVerifier(asr, heard[0], codec=codec)
    assert exactly(candidates[:1]) == [0]


def test_a_speaker_encoder_of_transformers_compares_voices():
    torch.manual_seed(0)
    layers = {"tdnn_dim": (16, 16, 16, 16, 24), "xvector_output_dim": 8}
    model = WavLMForXVector(WavLMConfig(**SHAPE, **layers)).eval()
    reference = tone([5] * 60)
    verifier = SpeakerSimilarityVerifier(
        model, reference, codec=tone, feature_extractor=Wav2Vec2FeatureExtractor(do_normalize=True)
    )
    same, other, short = verifier([[5] * 60, [30, 2] * 40, [5]])
    assert same == pytest.approx(1, abs=1e-5)
    assert -1 <= other < same
    assert -1 <= short <= 1
    assert verifier([[30, 2] * 40]) == [pytest.approx(other, abs=1e-6)]  # alone as among others


def test_a_speaker_encoder_may_be_in_bfloat16():
    torch.manual_seed(0)
    layers = {"tdnn_dim": (16, 16, 16, 16, 24), "xvector_output_dim": 8}
    model, scores = WavLMForXVector(WavLMConfig(**SHAPE, **layers)), []
    for kind in (torch.float32, torch.bfloat16):
        extractor = Wav2Vec2FeatureExtractor(do_normalize=True)
        verifier = SpeakerSimilarityVerifier(model.to(kind), tone([5] * 60), codec=tone, feature_extractor=extractor)
        scores.append(verifier([[5] * 60, [30, 2] * 40]))
    assert scores[1] == pytest.approx(scores[0], abs=0.02)


def test_a_model_that_hears_needs_a_codec():
    with pytest.raises(ValueError, match="codec must be given for a model that hears audio"):
        SpeakerSimilarityVerifier(WavLMForXVector(WavLMConfig(**SHAPE)), [0.0])


def test_the_sum_of_verifiers_is_weighted():
    def length(codes):
        return torch.tensor([float(len(c)) for c in codes])

    def first(codes):
        return [c[0] for c in codes]

    for weights in ({length: 2.0, first: -1.0}, [(length, 2.0), (first, -1.0)]):
        assert combine(weights)([[3, 4], [5]]) == [1.0, -3.0]
    with pytest.raises(ValueError, match="at least one verifier"):
        combine({})
    with pytest.raises(ValueError, match=r"one score for each candidate: .* gave 1 for 2"):
        combine({(lambda codes: [1.0]): 1.0})([[1], [2]])
