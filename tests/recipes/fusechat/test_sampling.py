"""Answers of a source: batches, seeds, chat templates, and going on after a kill."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BartConfig, BartForConditionalGeneration, GenerationConfig

from hf_stablespam.recipes.fusechat import sample_responses
from tests.recipes.fusechat.helpers import target, tokenizer

PROMPTS = ["ab", "cdefg", "h"]


def sample(model=None, prompts=PROMPTS, **options):
    defaults = {"source": "tiny", "num_responses": 3, "max_new_tokens": 5, "batch_size": 2}
    return sample_responses(model or target(), tokenizer(), prompts, **{**defaults, **options})


class Killed(Exception):
    """Stands for a signal."""


def killed_after(model, batches):
    """Lets `generate` work that many times."""
    original, calls = model.generate, []

    def generate(**inputs):
        if len(calls) == batches:
            raise Killed
        calls.append(1)
        return original(**inputs)

    model.generate = generate
    return model


def test_every_prompt_has_its_answers_in_order_whatever_the_state_of_the_generators():
    model = target().train()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    rows = sample(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert rows["prompt"][:] == [prompt for prompt in PROMPTS for _ in range(3)]
    assert set(rows["source"][:]) == {"tiny"}
    torch.manual_seed(6)
    assert sample(model).to_list() == rows.to_list()
    assert sample(model, seed=1)["response"][:] != rows["response"][:]
    assert sample(model, source="other")["response"][:] != rows["response"][:]
    assert len(set(rows["response"][:3])) > 1


def test_the_likeliest_answer_does_not_depend_on_the_padding():
    model = target()
    options = {"temperature": 0, "num_responses": 1}
    together = sample(model, batch_size=3, **options)["response"][:]
    assert together == [sample(model, prompts=[prompt], **options)["response"][0] for prompt in PROMPTS]


def test_an_answer_ends_at_the_end_token_and_says_so():
    model = target()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[1] = 1.0  # the end token
    model.lm_head.weight.requires_grad_(False)
    options = {"temperature": 0, "num_responses": 1, "prompts": ["a"]}
    with torch.no_grad():
        hidden = model.model(torch.tensor([tokenizer()("a")["input_ids"]])).last_hidden_state[0, -1].sum()
    rows = sample(model, **options)
    ends = bool(hidden > 0)
    assert rows["finished"][0] is ends
    model.lm_head.weight.mul_(-1)
    assert sample(model, **options)["finished"][0] is not ends


@pytest.mark.parametrize("ends", [True, False])
def test_the_token_a_decoder_starts_with_is_no_end(ends):
    torch.manual_seed(0)
    shape = {"vocab_size": 32, "d_model": 16, "max_position_embeddings": 64, "forced_eos_token_id": None}
    shape |= {f"{side}_{name}": 1 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    shape |= {f"{side}_ffn_dim": 16 for side in ("encoder", "decoder")}
    tokens = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, "decoder_start_token_id": 1}
    model = BartForConditionalGeneration(BartConfig(**shape, **tokens))
    with torch.no_grad():
        model.final_logits_bias[0, 1] = 1e9 if ends else -1e9
    rows = sample(model)
    assert rows["finished"][:] == [ends] * 9
    assert all((text == "") == ends for text in rows["response"])


def test_a_chat_template_is_applied_to_messages_only(caplog):
    model, seen = target(), []
    original = model.generate
    model.generate = lambda **inputs: seen.append(inputs["input_ids"]) or original(**inputs)
    chat = tokenizer(chat=True)
    options = {"source": "x", "num_responses": 1, "max_new_tokens": 2}
    (row,) = sample_responses(model, chat, [[{"role": "user", "content": "ab"}]], **options)
    assert chat.convert_ids_to_tokens(seen[0][0]) == ["U", "a", "b", "A"]
    assert row["prompt"] == [{"role": "user", "content": "ab"}]
    sample_responses(model, chat, ["ab"], **options)
    assert chat.convert_ids_to_tokens(seen[1][0]) == ["a", "b"]


FILTERS = {"min_p": 0.999, "typical_p": 0.1, "suppress_tokens": list(range(2, 20)), "no_repeat_ngram_size": 1}
FILTERS |= {"num_beams": 2, "num_return_sequences": 2, "min_new_tokens": 5}


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("name", FILTERS)
def test_no_filter_of_the_model_s_own_generation_config_is_applied(name, adapter):
    model = target()
    model.lm_head.weight.data[1] *= 3  # some answers end early
    expected = sample(model).to_list()
    model.generation_config = own = GenerationConfig(
        do_sample=True, **{name: FILTERS[name]}, pad_token_id=0, eos_token_id=1
    )
    if adapter:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert sample(model).to_list() == expected
    assert model.generation_config is own
    assert getattr(own, name) == FILTERS[name]


def test_special_tokens_of_the_model_s_own_generation_config_count():
    model = target()
    model.generation_config.forced_eos_token_id = 1
    assert all(sample(model)["finished"])


@pytest.mark.parametrize("cut", [None, "line", "letters"])
def test_a_killed_run_goes_on_and_gives_what_an_undisturbed_one_gives(tmp_path, cut):
    file, whole = tmp_path / "answers.jsonl", sample()
    with pytest.raises(Killed):
        sample(killed_after(target(), 3), output_file=file)
    assert len(file.read_text().splitlines()) == 6
    if cut == "line":  # killed between two lines of a batch
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    elif cut == "letters":
        file.write_text(file.read_text()[:-9])
    with pytest.raises(Killed):
        sample(killed_after(target(), 1), output_file=file)
    assert sample(output_file=file).to_list() == whole.to_list()
    assert [json.loads(line) for line in file.read_text().splitlines()] == whole.to_list()
    nothing_to_do = killed_after(target(), 0)
    assert sample(nothing_to_do, output_file=file).to_list() == whole.to_list()
    with pytest.raises(ValueError, match=r"of a call with the same arguments, it differs in temperature, seed"):
        sample(output_file=file, temperature=1.0, seed=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_responses": 0}, "num_responses must be an integer of at least 1, got 0"),
        ({"temperature": -1}, "temperature must be at least 0, got -1"),
        ({"temperature": 0}, "num_responses must be 1 then, got 3"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0"),
        ({"prompts": "ab"}, "must be a list of at least one prompt"),
        ({"prompts": []}, "must be a list of at least one prompt"),
        ({"max_new_tokens": 62}, "the model's 64 positions, prompt 1 has 5 tokens and max_new_tokens is 62"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        sample(output_file=tmp_path / "x.jsonl", **options)
    assert not list(tmp_path.iterdir())
