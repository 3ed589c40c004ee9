"""Tokens of markers and codes: ids as official, arithmetic both ways, and models that agree with their tokenizer."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AddedToken

from hf_stablespam.recipes.llasa import SpeechVocabulary, add_speech_tokens
from hf_stablespam.recipes.llasa.vocabulary import MARKERS, check_rows
from tests.recipes.llasa.helpers import CODES, golden, llama, speech_tokenizer, text_tokenizer


def test_ids_are_the_official_ones():
    tokenizer, vocabulary = speech_tokenizer()
    for token, index in golden("official")["tokenizer"]["ids"].items():
        assert tokenizer.convert_tokens_to_ids(token) == index
        assert vocabulary.markers.get(token, index) == index
    assert (vocabulary.first_code, vocabulary.end_id, len(tokenizer)) == (269, 266, 301)


def test_ids_of_the_real_vocabulary():
    """Llama-3.2 has 128,256 tokens; the released models' ids follow from the order of the markers."""
    real = golden("official")["real_vocabulary"]
    markers = {marker: real["llama_3_2_length"] + i for i, marker in enumerate(MARKERS)}
    for marker, index in markers.items():
        assert real[marker.strip("<|>").lower()] == index
    vocabulary = SpeechVocabulary(markers, real["first_code"], 65536, real["speech_generation_end"])
    assert vocabulary.encode([65535]) == [real["last_code"]]
    assert vocabulary.start_id == real["speech_generation_start"]
    assert len(vocabulary.token_ids) == real["total"] - real["llama_3_2_length"]


@given(st.lists(st.integers(0, CODES - 1)))
def test_decode_undoes_encode(codes):
    vocabulary = SpeechVocabulary(dict.fromkeys(MARKERS, 0), 269, CODES, 266)
    assert vocabulary.decode(vocabulary.encode(codes)) == codes
    assert vocabulary.encode(np.array(codes, dtype=np.int32)) == vocabulary.encode(torch.tensor(codes, dtype=torch.int))


def test_decoding_is_the_official_one_but_for_foreign_tokens():
    tokenizer, vocabulary = speech_tokenizer()
    plain, foreign = golden("official")["decoding"]
    assert vocabulary.decode(tokenizer.convert_tokens_to_ids(plain["tokens"])) == plain["back"]
    with pytest.raises(ValueError, match=r"token 266 is no code, those are 269 to 300.*end_id"):
        vocabulary.decode([269, 266])
    assert foreign["official_printed"]  # the official code prints and goes on


@pytest.mark.parametrize(("codes", "wrong"), [([0, 32], 32), ([-1], -1)])
def test_a_code_out_of_range_is_named(codes, wrong):
    _, vocabulary = speech_tokenizer()
    with pytest.raises(ValueError, match=rf"in \[0, 32\), the codebook's size, got {wrong}"):
        vocabulary.encode(codes)


@pytest.mark.parametrize("codes", [[0.5], [[1, 2]], ["1"], [True]])
def test_codes_that_are_no_integers_are_refused(codes):
    with pytest.raises(ValueError, match="codes must be a list of integers"):
        speech_tokenizer()[1].encode(codes)


def test_adding_twice_changes_nothing():
    tokenizer, vocabulary = speech_tokenizer()
    model = llama(len(tokenizer))
    before = model.get_input_embeddings().weight
    assert add_speech_tokens(tokenizer, CODES, model=model) == vocabulary
    assert model.get_input_embeddings().weight is before


def test_the_model_grows_and_keeps_its_rows_and_its_tie():
    tokenizer, model = text_tokenizer(), llama(261)
    before = model.get_input_embeddings().weight.detach().clone()
    add_speech_tokens(tokenizer, CODES, model=model)
    after = model.get_input_embeddings().weight
    assert torch.equal(after[:261], before)
    assert after.shape[0] == len(tokenizer) == model.config.vocab_size == 301
    assert after is model.get_output_embeddings().weight
    assert after[261:].std() > 0


def test_tokens_first_and_the_model_later(caplog):
    """The model is then one without any row for a code, which a warning says: it may be from elsewhere."""
    tokenizer, _ = speech_tokenizer()
    model = llama(261)
    assert not caplog.text
    add_speech_tokens(tokenizer, CODES, model=model)
    assert model.config.vocab_size == 301
    assert (
        "the model 261 embedding rows, none of them for codes; the others up to 301 are drawn at random" in caplog.text
    )
    caplog.clear()
    add_speech_tokens(tokenizer, CODES, model=model)
    add_speech_tokens(text_tokenizer(), CODES, model=llama(261))
    assert not caplog.text


def test_rows_that_pad_a_vocabulary_are_kept():
    """Qwen's embedding has more rows than its tokenizer has tokens."""
    tokenizer, model = text_tokenizer(), llama(320)
    add_speech_tokens(tokenizer, CODES, model=model)
    assert model.config.vocab_size == 320


def test_a_processor_is_as_good_as_its_tokenizer():
    class Processor:
        tokenizer = text_tokenizer()

    assert add_speech_tokens(Processor(), CODES) == speech_tokenizer()[1]


def test_saved_and_loaded_tokens_are_found_again(tmp_path):
    tokenizer, vocabulary = speech_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    assert add_speech_tokens(loaded, CODES) == vocabulary


def test_wrong_vocabularies_are_refused():
    some = text_tokenizer()
    some.add_tokens(["<|s_0|>", "<|s_1|>"])
    with pytest.raises(ValueError, match=r"has 2 of the 40 speech tokens, but not '<\|TEXT_GENERATION_START\|>'"):
        add_speech_tokens(some, CODES)

    scattered = text_tokenizer()
    codes = [f"<|s_{code}|>" for code in range(CODES)]
    scattered.add_tokens([AddedToken(token) for token in [*MARKERS, *codes[:5], *reversed(codes[5:])]])
    with pytest.raises(ValueError, match=r"must be contiguous: '<\|s_0\|>' is 269, so '<\|s_5\|>' should be 274"):
        add_speech_tokens(scattered, CODES)

    tokenizer, _ = speech_tokenizer()
    with pytest.raises(ValueError, match=r"'<\|s_16\|>', beyond a codebook_size of 16"):
        add_speech_tokens(tokenizer, 16)
    with pytest.raises(ValueError, match=r"codebook_size must be an integer of at least 1, got 0"):
        add_speech_tokens(tokenizer, 0)


def test_models_that_do_not_agree_are_refused():
    tokenizer, vocabulary = speech_tokenizer()
    with pytest.raises(ValueError, match=r"290 embedding rows, fewer than the tokenizer's 301.*same checkpoint"):
        add_speech_tokens(tokenizer, CODES, model=llama(290))
    with pytest.raises(ValueError, match=r"has 261 embedding rows, but the speech vocabulary needs 301"):
        check_rows(llama(261), vocabulary)
    adapted = get_peft_model(llama(261), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="before get_peft_model"):
        add_speech_tokens(tokenizer, CODES, model=adapted)
