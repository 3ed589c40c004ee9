"""The search on a real, tiny model: what it draws, what it keeps, and that the cache changes nothing."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from hf_stablespam import FourBitConfig, FourBitLinear, convert_to_4bit
from hf_stablespam.recipes.llasa import (
    SpeechTokensLogitsProcessor,
    best_of_n,
    process_beam_search,
    speech_prompt,
)
from hf_stablespam.recipes.llasa.generation import Continuations
from tests.recipes.llasa.helpers import llama, speech_tokenizer

TOKENIZER, VOCABULARY = speech_tokenizer()
PROMPT = speech_prompt(TOKENIZER, VOCABULARY, "Hi.", reference_codes=[3, 1, 4])
SAMPLING = {"do_sample": True, "temperature": 1.0}


def mean(codes: list[list[int]]) -> list[float]:
    """A verifier: the mean of the codes."""
    return [sum(c) / len(c) for c in codes]


def constant(codes: list[list[int]]) -> list[float]:
    return [0.0] * len(codes)


def ends_soon():
    """Ends speech after a few codes: the end's row points where hidden states do."""
    model = llama(301)
    with torch.no_grad():
        hidden = model.model(torch.tensor([PROMPT])).last_hidden_state[0, -1]
        model.get_input_embeddings().weight[VOCABULARY.end_id] = 0.3 * hidden / hidden.norm()
    return model


@pytest.fixture(scope="module")
def model():
    return ends_soon()


def sample(model, seed, **options):
    torch.manual_seed(seed)
    return model.generate(
        torch.tensor([PROMPT]),
        eos_token_id=VOCABULARY.end_id,
        pad_token_id=VOCABULARY.end_id,
        logits_processor=[SpeechTokensLogitsProcessor(VOCABULARY, prompt_length=len(PROMPT))],
        **options,
    )[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("seed", range(4))
def test_one_candidate_is_what_generate_gives(model, seed):
    ids = sample(model, seed, max_new_tokens=30, **SAMPLING)
    torch.manual_seed(seed)
    result = best_of_n(model, PROMPT, mean, n=1, vocabulary=VOCABULARY, max_new_tokens=30, **SAMPLING)
    assert VOCABULARY.encode(result.codes) == [token for token in ids if token != VOCABULARY.end_id]
    assert result.finished == (VOCABULARY.end_id in ids)
    assert result.scores == [result.score] == mean([result.codes])


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_one_beam_of_one_expansion_is_what_generate_gives(model, seed, use_cache):
    ids = sample(model, seed, max_new_tokens=30, **SAMPLING)
    torch.manual_seed(seed)
    result = process_beam_search(
        model,
        *(PROMPT, mean),
        **{"vocabulary": VOCABULARY, "beam_width": 1, "expansions": 1, "chunk_size": 7, "max_new_tokens": 30},
        use_cache=use_cache,
        **SAMPLING,
    )
    assert VOCABULARY.encode(result.codes) == [token for token in ids if token != VOCABULARY.end_id]
    assert len(result.steps) == -(-len(ids) // 7)


@pytest.mark.parametrize("options", [{"do_sample": False}, SAMPLING, {}], ids=["greedy", "sampling", "official"])
@pytest.mark.parametrize("until", [None, 12])
def test_searching_with_and_without_the_cache_agrees(model, options, until):
    results = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        results.append(
            process_beam_search(
                model,
                *(PROMPT, mean),
                **{"vocabulary": VOCABULARY, "beam_width": 3, "expansions": 2, "chunk_size": 5, "max_new_tokens": 24},
                **{"until": until, "use_cache": use_cache, **options},
            )
        )
    assert results[0] == results[1]


@pytest.mark.parametrize("own", [False, True])
def test_a_cache_of_which_no_rows_can_be_chosen_is_not_kept(own):
    model, results = ends_soon(), []
    for option in ({}, {"cache_implementation": "static"}):
        model.generation_config = GenerationConfig(**(option if own else {}))
        torch.manual_seed(0)
        options = {
            "vocabulary": VOCABULARY,
            "chunk_size": 5,
            "max_new_tokens": 24,
            **SAMPLING,
            **({} if own else option),
        }
        results.append(process_beam_search(model, PROMPT, mean, **options))
    assert len(results[0].steps) > 1
    assert results[0] == results[1]


def test_the_official_sampling_holds_where_none_is_asked_for(model):
    official = {"do_sample": True, "temperature": 0.8, "top_p": 1.0, "repetition_penalty": 1.2}
    found = []
    for options in ({}, official, {"do_sample": True}):
        torch.manual_seed(1)
        found.append(best_of_n(model, PROMPT, mean, 2, vocabulary=VOCABULARY, max_new_tokens=20, **options).candidates)
    assert found[0] == found[1] != found[2]
    assert all(len(codes) <= 2048 - len(PROMPT) for codes in found[0])


@pytest.mark.parametrize("search", ["best of n", "process"])
def test_what_a_prompt_may_be(model, search):
    found = []
    for prompt in (
        PROMPT,
        torch.tensor(PROMPT),
        torch.tensor([PROMPT]),
        {"input_ids": torch.tensor([PROMPT]), "attention_mask": torch.ones(1, len(PROMPT))},
    ):
        torch.manual_seed(0)
        options = {"vocabulary": VOCABULARY, "max_new_tokens": 6}
        if search == "process":
            options |= {"beam_width": 2, "expansions": 1, "chunk_size": 3}
        found.append((best_of_n if search == "best of n" else process_beam_search)(model, prompt, mean, **options))
    assert found.count(found[0]) == len(found)


@pytest.mark.parametrize(
    ("config", "options", "most"),
    [
        ({"max_new_tokens": 5}, {}, 5),
        ({"max_new_tokens": 5}, {"max_length": len(PROMPT) + 9}, 5),
        ({"max_new_tokens": 5}, {"max_new_tokens": 7}, 7),
        ({"max_length": len(PROMPT) + 6}, {}, 6),
        ({"max_length": len(PROMPT) + 6}, {"max_length": len(PROMPT) + 9}, 9),
        ({}, {"max_new_tokens": 3}, 3),
    ],
)
def test_the_length_of_a_generation_config_counts(model, config, options, most):
    given = {"generation_config": GenerationConfig(do_sample=True, **config), "min_codes": most, **options}
    torch.manual_seed(0)
    result = best_of_n(model, PROMPT, mean, 4, vocabulary=VOCABULARY, **given)
    assert {len(codes) for codes in result.candidates} == {most}


def test_a_generation_config_without_a_length_leaves_the_official_one(model):
    config = GenerationConfig(do_sample=True)
    assert Continuations(model, PROMPT, VOCABULARY, {"generation_config": config}).max_new_tokens == 2048 - len(PROMPT)


@pytest.mark.parametrize("option", [{"min_new_tokens": 5}, {"num_beams": 2}, {"num_return_sequences": 2}])
def test_what_the_search_sets_no_generation_config_changes(option):
    model, found = ends_soon(), []
    for own in ({}, option):
        model.generation_config = GenerationConfig(do_sample=True, **own)
        torch.manual_seed(0)
        options = {"vocabulary": VOCABULARY, "chunk_size": 3, "max_new_tokens": 30, **SAMPLING}
        found.append(process_beam_search(model, PROMPT, mean, **options))
    assert found[0] == found[1]
    assert found[0].finished


def test_a_constant_verifier_gets_the_first_finished_candidate(model):
    torch.manual_seed(0)
    result = best_of_n(model, PROMPT, constant, n=12, vocabulary=VOCABULARY, max_new_tokens=6, **SAMPLING)
    assert any(result.candidates_finished)
    assert not all(result.candidates_finished)
    assert result.codes == result.candidates[result.candidates_finished.index(True)]


def test_a_cut_candidate_never_wins_over_a_finished_one(model):
    torch.manual_seed(0)
    lengths = best_of_n(
        model,
        PROMPT,
        lambda codes: [len(c) for c in codes],
        n=12,
        vocabulary=VOCABULARY,
        max_new_tokens=6,
        **SAMPLING,
    )
    assert lengths.finished
    assert max(lengths.scores) > lengths.score


def test_each_step_draws_no_more_than_width_times_expansions(model):
    torch.manual_seed(0)
    result = process_beam_search(
        model,
        *(PROMPT, mean),
        **{"vocabulary": VOCABULARY, "beam_width": 3, "expansions": 3, "chunk_size": 4, "max_new_tokens": 40},
        **SAMPLING,
    )
    live = 1
    for step in result.steps:
        assert len(step.candidates) == 9 // live * live
        assert [c.parent for c in step.candidates] == sorted(c.parent for c in step.candidates)
        live = sum(not step.candidates[i].finished for i in step.kept)
    assert result.score == max(s for s, f in zip(result.scores, result.candidates_finished, strict=True) if f)


def test_a_process_search_finds_more_of_what_its_verifier_likes(model):
    torch.manual_seed(0)
    options = {"vocabulary": VOCABULARY, "max_new_tokens": 40, **SAMPLING}
    plain = [best_of_n(model, PROMPT, mean, 1, **options).score for _ in range(8)]
    searched = [process_beam_search(model, PROMPT, mean, chunk_size=4, **options).score for _ in range(4)]
    assert sum(searched) / 4 > sum(plain) / 8 + 1.5


def test_until_stops_the_process_and_the_final_verifier_chooses(model):
    seen = []

    def process(codes):
        seen.append([len(c) for c in codes])
        return mean(codes)

    def shortest(codes):
        return [-len(c) for c in codes]

    torch.manual_seed(0)
    result = process_beam_search(
        model,
        *(PROMPT, process),
        **{"vocabulary": VOCABULARY, "beam_width": 2, "expansions": 2, "chunk_size": 4, "max_new_tokens": 60},
        **{"until": 6, "final_verifier": shortest, **SAMPLING},
    )
    assert max(map(max, seen)) == 6  # 4 codes, then 2
    assert len(result.steps) == 2
    assert result.scores == [-len(codes) for codes in result.candidates]
    finished = [len(c) for c, f in zip(result.candidates, result.candidates_finished, strict=True) if f]
    assert result.score == -min(finished)


def test_a_final_verifier_without_until_chooses_among_the_complete(model):
    torch.manual_seed(0)
    options = {"vocabulary": VOCABULARY, "beam_width": 2, "expansions": 2, "chunk_size": 4, "max_new_tokens": 60}
    result = process_beam_search(model, PROMPT, mean, final_verifier=lambda c: [-x for x in mean(c)], **options)
    assert result.score == max(
        score for score, finished in zip(result.scores, result.candidates_finished, strict=True) if finished
    )
    assert result.scores == [-x for x in mean(result.candidates)]


def test_where_nothing_finishes_a_warning_says_so(model, caplog):
    result = best_of_n(model, PROMPT, mean, 2, vocabulary=VOCABULARY, min_codes=9, max_new_tokens=3)
    assert not result.finished
    assert len(result.codes) == 3
    assert "none of 2 candidates finished" in caplog.text


def test_empty_speech_loses_and_alone_is_returned_as_unfinished(model, caplog):
    class EndsAtOnce(torch.nn.Module):
        def __call__(self, input_ids, scores):
            forced = torch.full_like(scores, -torch.inf)
            forced[:, VOCABULARY.end_id] = 0
            return forced

    result = best_of_n(model, PROMPT, mean, 2, vocabulary=VOCABULARY, min_codes=0, logits_processor=[EndsAtOnce()])
    assert (result.codes, result.finished, result.candidates_finished) == ([], False, [True, True])
    assert result.score == -float("inf")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n must be an integer of at least 1, got 0"),
        ({"beam_width": 0}, "beam_width must be an integer of at least 1, got 0"),
        ({"expansions": 1.5}, "expansions must be an integer of at least 1, got 1.5"),
        ({"chunk_size": -1}, "chunk_size must be an integer of at least 1, got -1"),
        ({"until": 0}, "until must be an integer of at least 1, got 0"),
        ({"until": 21, "max_new_tokens": 20}, "until must be at most 20, the codes that may be written, got 21"),
        ({"n": 1, "max_length": 20}, r"max_length must be above the prompt's 59 tokens, got 20"),
        ({"n": 1, "max_new_tokens": 0}, r"max_new_tokens"),
        ({"n": 1, "num_return_sequences": 2}, "num_return_sequences is set by the search itself"),
        ({"n": 1, "min_codes": -1}, "min_codes must be at least 0, got -1"),
        ({"min_new_tokens": 5}, "min_new_tokens is set by the search itself; leave it out, and give min_codes"),
        ({"generation_config": GenerationConfig(min_new_tokens=5)}, "leave it out, and give min_codes: it would begin"),
    ],
)
def test_wrong_options_are_refused(model, options, message):
    search = best_of_n if "n" in options else process_beam_search
    with pytest.raises(ValueError, match=message):
        search(model, PROMPT, mean, vocabulary=VOCABULARY, **options)


@pytest.mark.parametrize(
    "option",
    [
        {"max_time": 5.0},
        {"exponential_decay_length_penalty": (3, 1.1)},
        {"begin_suppress_tokens": [1]},
        {"forced_eos_token_id": VOCABULARY.end_id},
    ],
)
def test_what_counts_within_a_chunk_is_refused_where_there_are_several(option):
    (name,) = option
    asked = {"vocabulary": VOCABULARY, "max_new_tokens": 6, "chunk_size": 3}
    for given in (option, {"generation_config": GenerationConfig(**option)}):
        with pytest.raises(ValueError, match=f"{name} must be None in a search by chunks"):
            process_beam_search(ends_soon(), PROMPT, mean, **asked, **given)
    model = ends_soon()
    model.generation_config = GenerationConfig(**option)
    with pytest.raises(ValueError, match=f"{name} must be None in a search by chunks"):
        process_beam_search(model, PROMPT, mean, **asked)
    assert best_of_n(model, PROMPT, mean, vocabulary=VOCABULARY, n=1, max_new_tokens=6).codes is not None


@pytest.mark.parametrize("prompt", [[], torch.zeros(2, 4, dtype=torch.long), [0.5]])
def test_a_prompt_that_is_none_is_refused(model, prompt):
    with pytest.raises(ValueError, match="inputs must be one prompt"):
        best_of_n(model, prompt, mean, vocabulary=VOCABULARY)


def test_a_padded_prompt_is_refused(model):
    inputs = {"input_ids": torch.tensor([PROMPT]), "attention_mask": torch.zeros(1, len(PROMPT))}
    with pytest.raises(ValueError, match="without padding"):
        best_of_n(model, inputs, mean, vocabulary=VOCABULARY)


def test_a_model_without_rows_is_refused():
    with pytest.raises(ValueError, match="261 embedding rows, but the speech vocabulary needs 301"):
        best_of_n(llama(261), PROMPT, mean, vocabulary=VOCABULARY)
    processor = SpeechTokensLogitsProcessor(VOCABULARY)
    with pytest.raises(ValueError, match="scores 261 tokens, but the speech vocabulary needs 301"):
        processor(torch.tensor([PROMPT]), torch.zeros(1, 261))


def test_nothing_but_codes_is_allowed_and_the_end_only_after_some():
    prompts = torch.tensor([[257, *PROMPT[:-3]], [*PROMPT[:-3], 280]])  # nothing, and one code, after the marker
    allowed = SpeechTokensLogitsProcessor(VOCABULARY)(prompts, torch.ones(2, 310)).isfinite()
    assert allowed[:, 269:301].all()
    assert allowed.sum(1).tolist() == [32, 33]
    assert allowed[1, VOCABULARY.end_id]
    scores = torch.ones(2, 310)
    assert torch.equal(SpeechTokensLogitsProcessor(VOCABULARY, min_codes=0)(prompts, scores)[:, 266], torch.ones(2))
    assert torch.equal(scores, torch.ones(2, 310))


def test_dropout_is_off_meanwhile_and_modes_are_as_before():
    model = llama(301, attention_dropout=0.9).train()
    model.model.norm.eval()
    torch.manual_seed(0)
    first = best_of_n(model, PROMPT, mean, 2, vocabulary=VOCABULARY, max_new_tokens=8)
    assert model.training
    assert not model.model.norm.training
    torch.manual_seed(0)
    assert best_of_n(model.eval(), PROMPT, mean, 2, vocabulary=VOCABULARY, max_new_tokens=8) == first


def test_four_bit_and_adapted_models_are_searched_like_others():
    """With the cache and without it, the same converted model writes the same speech."""
    converted = convert_to_4bit(llama(301), FourBitConfig(group_size=32))
    adapted = get_peft_model(llama(301), LoraConfig(r=2, target_modules=["q_proj"])).eval()
    for model in (converted, adapted):
        results = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            options = {"chunk_size": 4, "max_new_tokens": 12, "use_cache": use_cache}
            results.append(process_beam_search(model, PROMPT, mean, vocabulary=VOCABULARY, **options))
        assert results[0] == results[1]


def test_four_bit_weights_are_rounded_once_for_a_search(monkeypatch):
    model, made = convert_to_4bit(llama(301), FourBitConfig(group_size=32)), []
    rounded = FourBitLinear.quantized_weight
    monkeypatch.setattr(FourBitLinear, "quantized_weight", lambda *args: made.append(args[0]) or rounded(*args))
    options = {"chunk_size": 4, "max_new_tokens": 8, "vocabulary": VOCABULARY}
    process_beam_search(model, PROMPT, mean, **options)
    assert len(made) == len(set(made)) == sum(isinstance(module, FourBitLinear) for module in model.modules())
    assert all(layer._kept is None for layer in made)
