"""Ids and labels as official; padding, order and references; what is refused."""

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Sequence, Value

from hf_stablespam.recipes.llasa import SpeechTokenCollator, speech_prompt
from hf_stablespam.recipes.llasa.collator import IGNORED
from tests.recipes.llasa.helpers import CODES, golden, llama, speech_tokenizer, text_tokenizer

CASES = golden("official")["training"]
ROWS = [
    {"text": "Hi.", "codes": [3, 0, 31, 7]},
    {"text": "Grüße, <b> 7!", "codes": list(range(9))},
    {"text": "a", "codes": [5]},
]


def collator(**options) -> SpeechTokenCollator:
    return SpeechTokenCollator(*speech_tokenizer(), **options)


def spoken(case: dict) -> list[int]:
    """The codes that a golden case's storage kept, where it cut some off."""
    first = golden("official")["tokenizer"]["ids"]["<|s_0|>"]
    return [token - first for token in case["stored_ids"] if first <= token < first + CODES]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['text']} {case['pad_token']}")
def test_training_sequences_are_the_official_ones(case):
    official_ids, official_labels = case["official_input_ids"], case["official_labels"]
    is_complete = official_labels.count(266) == 1
    cut_when_stored = not is_complete and len(spoken(case)) < len(case["codes"])
    # A row that was cut when it was stored has its end of turn right behind the codes; ours is cut by max_length.
    limit = official_labels.index(265) + 1 + len(spoken(case)) if cut_when_stored else case["max_length"]
    batch = collator(max_length=limit, pad_to_multiple_of=None)([{"text": case["text"], "codes": case["codes"]}])
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    assert ids == official_ids[: len(ids)]
    expected = official_labels[: len(ids)]
    if case["pad_token"] == "<|finetune_right_pad_id|>" and is_complete:
        assert expected[-1] == 257  # the chat's end of turn, which the released models were not trained on
        expected[-1] = IGNORED
    assert labels == expected
    rest = {*official_labels[len(ids) :]}
    assert rest <= {IGNORED}


@pytest.mark.parametrize(("codes", "length"), [(200, 100), (1, 64)])
def test_no_batch_is_longer_than_the_longest_sequence_may_be(codes, length):
    batch = collator(max_length=100)([{"text": "Hi.", "codes": [1] * codes}])
    assert all(tensor.shape == (1, length) for tensor in batch.values())


@pytest.mark.parametrize("case", golden("official")["generation_prompt"], ids=lambda case: case["text"])
def test_prompts_are_the_official_ones(case):
    assert (
        speech_prompt(*speech_tokenizer(), case["text"], reference_codes=case["reference_codes"]) == case["input_ids"]
    )


def test_a_training_sequence_begins_with_the_prompt_of_generation():
    row = {"text": "b", "codes": [4, 5], "speaker": "Speaker kore", "reference_text": "a", "reference_codes": [1, 2]}
    tokenizer, vocabulary = speech_tokenizer()
    options = {name: row[name] for name in ("speaker", "reference_text", "reference_codes")}
    prompt = speech_prompt(tokenizer, vocabulary, row["text"], **options)
    batch = collator(pad_to_multiple_of=None)([row])
    assert batch["input_ids"][0, : len(prompt)].tolist() == prompt
    decoded = tokenizer.decode(prompt)
    assert "a b<|TEXT_UNDERSTANDING_END|>" in decoded
    assert decoded.endswith("Speaker kore <|SPEECH_GENERATION_START|><|s_1|><|s_2|>")
    learned = batch["labels"][0][batch["labels"][0] != IGNORED].tolist()
    assert learned == [vocabulary.start_id, *vocabulary.encode([4, 5]), vocabulary.end_id]


def test_a_date_in_the_template_does_not_change_by_day():
    tokenizer, vocabulary = speech_tokenizer()
    dated = "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}"
    tokenizer.chat_template = dated + tokenizer.chat_template
    assert tokenizer.decode(speech_prompt(tokenizer, vocabulary, "Hi.")).startswith("26 Jul 2024")


def test_every_code_and_both_markers_are_labels():
    batch = collator()(ROWS)
    assert (batch["labels"] != IGNORED).sum(1).tolist() == [len(row["codes"]) + 2 for row in ROWS]
    assert batch["input_ids"].shape[1] % 8 == 0
    assert torch.equal(batch["labels"][batch["labels"] != IGNORED], batch["input_ids"][batch["labels"] != IGNORED])


def test_padding_side_and_order_change_nothing():
    right = collator()
    left = collator()
    left.tokenizer.padding_side = "left"
    a, b = right(ROWS), left(ROWS[::-1])
    for i, j in ((0, 2), (1, 1), (2, 0)):
        for name in ("input_ids", "labels"):
            one = a[name][i][a["attention_mask"][i] == 1]
            assert torch.equal(one, b[name][j][b["attention_mask"][j] == 1])
    assert a["attention_mask"][0, 0] == 1
    assert b["attention_mask"][0, -1] == 1


def test_the_end_of_turn_inside_the_prompt_stays_visible():
    """The official mask, made from ids, hides it where the pad token is the end of turn."""
    batch = collator()([ROWS[0]])
    end_of_turn = batch["input_ids"][0] == 257
    assert end_of_turn.sum() == 2
    assert batch["attention_mask"][0][end_of_turn].all()


def test_the_loss_of_a_row_is_its_share_of_the_batch():
    collate = collator()
    model = llama(301)
    with torch.no_grad():
        alone = [model(**collate([row])).loss for row in ROWS]
        together = model(**collate(ROWS)).loss
    weights = [len(row["codes"]) + 2 for row in ROWS]
    share = sum(w * loss for w, loss in zip(weights, alone, strict=True)) / sum(weights)
    torch.testing.assert_close(together, share, rtol=1e-5, atol=1e-5)


def test_rows_of_a_data_set_and_of_arrays_are_equal():
    features = Features({"text": Value("string"), "codes": Sequence(Value("int32")), "speaker": Value("string")})
    data = Dataset.from_list([{**row, "speaker": None} for row in ROWS], features=features)
    expected = collator()(ROWS)["input_ids"]
    assert torch.equal(collator()([data[i] for i in range(3)])["input_ids"], expected)
    arrays = [{**row, "codes": np.array(row["codes"])} for row in ROWS]
    assert torch.equal(collator()(arrays)["input_ids"], expected)


def test_long_rows_are_cut_or_left_out_and_counted(caplog):
    long = {"text": "a", "codes": [1] * 60}
    cut = collator(max_length=80)
    batch = cut([ROWS[0], long, long])
    assert batch["input_ids"].shape == (3, 80)
    assert (batch["labels"] == 266).sum(1).tolist() == [1, 0, 0]
    assert (cut.num_cut, cut.num_dropped) == (2, 0)
    assert caplog.text.count("rows longer than max_length=80 are cut") == 1

    drop = collator(max_length=80, truncation="drop")
    assert torch.equal(drop([long, ROWS[0]])["input_ids"], drop([ROWS[0]])["input_ids"])
    assert (drop.num_cut, drop.num_dropped) == (0, 1)
    with pytest.raises(ValueError, match=r"every row of a batch of 2 is longer than max_length=80"):
        drop([long, long])


def test_only_the_end_of_turn_cut_off_is_no_loss():
    whole = collator(pad_to_multiple_of=None)([ROWS[0]])["input_ids"]
    collate = collator(max_length=whole.shape[1] - 1, pad_to_multiple_of=None)
    assert torch.equal(collate([ROWS[0]])["input_ids"], whole[:, :-1])
    assert collate.num_cut == 0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "codes": [1, 32]}, r"row 1 of the batch: a code must be in \[0, 32\).*got 32"),
        ({"text": "a", "codes": [-1]}, r"row 1 .*got -1"),
        ({"text": "a", "codes": []}, "row 1 .*codes must not be empty"),
        ({"text": "  ", "codes": [1]}, "row 1 .*text must not be empty"),
        ({"text": "a"}, r'row 1 .*needs "text" and "codes".*remove_unused_columns=False'),
        ({"text": "a <|SPEECH_GENERATION_END|>", "codes": [1]}, r"text must not contain '<\|SPEECH_GENERATION_END\|>'"),
        ({"text": "a <|s_3|>", "codes": [1]}, r"text must not contain '<\|s_3\|>'"),
        ({"text": "a <|eot_id|>", "codes": [1]}, r"text must not contain '<\|eot_id\|>'"),
        ({"text": "a", "codes": [1], "speaker": "<|s_3|>"}, r"speaker must not contain '<\|s_3\|>'"),
        ({"text": "a", "codes": [1], "reference_text": "b"}, "reference_text needs reference_codes"),
        ({"text": "a" * 200, "codes": [1]}, r"max_length=120 is not above its prompt's 253 tokens, so no code"),
    ],
)
def test_a_wrong_row_is_named(row, message):
    with pytest.raises(ValueError, match=message):
        collator(max_length=120)([ROWS[0], row])


def test_wrong_options_are_refused():
    tokenizer, vocabulary = speech_tokenizer()
    with pytest.raises(ValueError, match=r"max_length must be above the prompt's 53 tokens .*, got 53"):
        SpeechTokenCollator(tokenizer, vocabulary, max_length=53)
    with pytest.raises(ValueError, match=r'truncation must be "cut" or "drop", got \'left\''):
        SpeechTokenCollator(tokenizer, vocabulary, truncation="left")
    with pytest.raises(ValueError, match="pad_to_multiple_of must be None or at least 1, got 0"):
        SpeechTokenCollator(tokenizer, vocabulary, pad_to_multiple_of=0)
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.raises(
        ValueError, match=r"pad_token must be a token of its own, but it is '<\|eot_id\|>'.*right_pad_id"
    ):
        SpeechTokenCollator(tokenizer, vocabulary)
    with pytest.raises(ValueError, match=r"pad_token must be a token of its own, but there is none"):
        SpeechTokenCollator(text_tokenizer(None), vocabulary)


def test_a_template_that_drops_a_turn_is_refused():
    tokenizer, vocabulary = speech_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(ValueError, match="chat template must keep both turns"):
        speech_prompt(tokenizer, vocabulary, "Hi.")
