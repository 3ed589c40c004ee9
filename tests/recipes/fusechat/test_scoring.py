"""Rewards from functions and from reward models."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    LlamaConfig,
    LlamaForSequenceClassification,
)
from transformers.modeling_outputs import ModelOutput

from hf_stablespam.recipes.fusechat import score_responses
from tests.recipes.fusechat.helpers import tokenizer

ROWS = [{"prompt": "ab", "response": letter * length} for letter in "cde" for length in (1, 4, 2)]


def reward_model(labels=1, pad=0):
    torch.manual_seed(0)
    shape = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_labels": labels, "pad_token_id": pad}
    return LlamaForSequenceClassification(LlamaConfig(**shape))


def test_a_function_scores_batches_and_the_rows_stay():
    sizes = []

    def reward(prompts, responses):
        sizes.append((len(prompts), len(responses)))
        return torch.tensor([len(text) / 10 for text in responses])

    scored = score_responses(ROWS, reward, batch_size=4, score_key="length")
    assert sizes == [(4, 4), (4, 4), (1, 1)]
    assert scored["length"][:] == pytest.approx([0.1, 0.4, 0.2] * 3)
    assert scored.remove_columns("length").to_list() == ROWS


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("pad", [0, None])
def test_a_model_gives_the_same_scores_in_batches_and_row_by_row(chat, pad):
    model = reward_model(pad=pad)
    together = score_responses(Dataset.from_list(ROWS), model, tokenizer(chat), batch_size=4)["reward"][:]
    assert together == pytest.approx(score_responses(ROWS, model, tokenizer(chat), batch_size=1)["reward"][:], abs=1e-6)
    texts = [f"U{row['prompt']}A{row['response']}</s>" if chat else row["prompt"] + row["response"] for row in ROWS]
    with torch.no_grad():
        expected = [model(tokenizer()(text, return_tensors="pt")["input_ids"]).logits.item() for text in texts]
    assert together == pytest.approx(expected, abs=1e-6)
    assert len(set(together)) > 1


def test_messages_are_scored_as_their_texts():
    chat = [
        {
            "prompt": [{"role": "user", "content": r["prompt"]}],
            "response": [{"role": "assistant", "content": r["response"]}],
        }
        for r in ROWS
    ]
    model = reward_model()
    for with_template in (False, True):
        scores = [score_responses(rows, model, tokenizer(with_template))["reward"][:] for rows in (ROWS, chat)]
        assert scores[0] == scores[1]


@pytest.mark.parametrize(("adapter", "max_length"), [(False, None), (True, None), (False, 6)])
def test_segments_reach_a_model_that_has_them(tmp_path, adapter, max_length):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]))
    words = BertTokenizerFast.from_pretrained(tmp_path)
    torch.manual_seed(0)
    shape = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "pad_token_id": 0}
    shape |= {"num_attention_heads": 2, "num_labels": 1, "initializer_range": 0.5}
    model = BertForSequenceClassification(BertConfig(**shape)).eval()
    if adapter:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    pairs = [("a b", "c d"), ("a", "b c d e f g"), ("a b c", "a b")]
    expected = []
    for prompt, response in pairs:
        inputs = {name: values[:, :max_length] for name, values in words(prompt, response, return_tensors="pt").items()}
        with torch.no_grad():
            expected.append(model.eval()(**inputs).logits.item())
    rows = [{"prompt": prompt, "response": response} for prompt, response in pairs]
    scored = score_responses(rows, model, words, batch_size=3, max_length=max_length)
    assert scored["reward"][:] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("scalar", [np.float32, np.int64, torch.tensor])
def test_scalars_of_other_libraries_are_numbers(scalar):
    scored = score_responses(ROWS, lambda prompts, answers: [scalar(2) for _ in answers])
    assert scored["reward"][:] == [2.0] * len(ROWS)


def test_a_model_with_a_score_of_its_own():
    class Scored(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, input_ids, attention_mask):
            return ModelOutput(logits=torch.zeros(len(input_ids), 19), score=attention_mask.sum(1) * self.weight)

    rows = score_responses(ROWS[:3], Scored(), tokenizer(), batch_size=1)
    assert rows["reward"][:] == [3.0, 6.0, 4.0]


@pytest.mark.parametrize(
    ("reward", "error", "message"),
    [
        (lambda p, r: [1.0], ValueError, "a number for each row, got 1 for 4 rows"),
        (lambda p, r: [float("nan")] * len(r), ValueError, "a finite number, got nan for row 0"),
        (lambda p, r: ["good"] * len(r), ValueError, "a finite number, got 'good' for row 0"),
        ("ArmoRM", TypeError, "reward must be a function or a model, got str"),
        (reward_model(), TypeError, "needs its tokenizer"),
    ],
)
def test_wrong_rewards(reward, error, message):
    with pytest.raises(error, match=message):
        score_responses(ROWS, reward, batch_size=4)


def test_wrong_columns_and_models():
    with pytest.raises(ValueError, match=r"column 'answer', its columns are 'prompt', 'response'"):
        score_responses(ROWS, len, response_key="answer")
    with pytest.raises(ValueError, match="have a column 'prompt' already"):
        score_responses(ROWS, len, score_key="prompt")
    with pytest.raises(ValueError, match=r"must have one label, the logits have the shape \(9, 2\)"):
        score_responses(ROWS, reward_model(labels=2), tokenizer(), batch_size=9)


def test_inputs_are_cut_only_if_asked_for(caplog):
    import logging

    with caplog.at_level(logging.WARNING):
        logging.getLogger("transformers").propagate = True
        cut = score_responses(ROWS, reward_model(), tokenizer(), max_length=3)["reward"][:]
    assert cut[0] == cut[1] == cut[2] != cut[3]
