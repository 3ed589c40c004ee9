"""With the Trainer: Stable-SPAM, 4 bits, adapters, checkpoints; and search after it."""

import random

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from hf_stablespam import FourBitCallback, FourBitConfig, FourBitLinear
from hf_stablespam.recipes.llasa import (
    SpeechTokenCollator,
    WordErrorVerifier,
    add_speech_tokens,
    best_of_n,
    speech_prompt,
)
from tests.recipes.llasa.helpers import CODES, llama, speech_tokenizer, text_tokenizer
from tests.trainer.helpers import arguments, training_logs

LETTERS = "abcd"


def spoken(text: str, draw: random.Random) -> list[int]:
    """Each letter as two to four codes, of two of its own; one code in eight is noise."""
    codes = [8 * LETTERS.index(letter) + draw.randrange(2) for letter in text for _ in range(draw.randint(2, 4))]
    return [draw.randrange(CODES) if draw.random() < 0.12 else code for code in codes]


def rows(number: int) -> list[dict]:
    draw = random.Random(0)
    texts = [draw.choice(LETTERS) for _ in range(number)]
    return [{"text": text, "codes": spoken(text, draw)} for text in texts]


def listen(inputs: list[list[int]]) -> list[str]:
    """A recogniser: the letters of runs of codes."""
    heard = []
    for codes in inputs:
        letters = [LETTERS[code // 8] for code in codes]
        runs = [letter for i, letter in enumerate(letters) if i == 0 or letters[i - 1] != letter]
        heard.append("".join(runs))
    return heard


def trained(folder, model, tokenizer, vocabulary, **options):
    callbacks = options.pop("callbacks", [])
    collator = SpeechTokenCollator(tokenizer, vocabulary, max_length=128)
    args = arguments(folder, **{"learning_rate": 5e-3, "remove_unused_columns": False, **options})
    trainer = Trainer(
        model, args, train_dataset=rows(256), data_collator=collator, processing_class=tokenizer, callbacks=callbacks
    )
    trainer.train()
    return trainer


@pytest.mark.slow
def test_more_candidates_make_fewer_errors_after_training_in_4_bits(tmp_path):
    tokenizer, vocabulary = speech_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"  # short, so quick
    model = llama(len(tokenizer), initializer_range=0.02, hidden_size=64, intermediate_size=128)
    callback = FourBitCallback(FourBitConfig(group_size=32))
    options = {
        "max_steps": 120,
        "per_device_train_batch_size": 16,
        "logging_steps": 10,
        "lr_scheduler_type": "constant",
    }
    trainer = trained(tmp_path, model, tokenizer, vocabulary, callbacks=[callback], **options)
    assert any(isinstance(module, FourBitLinear) for module in model.modules())
    assert type(model.get_output_embeddings()) is torch.nn.Linear  # the head stays in full precision
    losses = [row["loss"] for row in training_logs(trainer)]
    assert losses[-1] < 0.6 * losses[0]

    torch.manual_seed(0)
    errors = {1: 0.0, 16: 0.0}
    for row in rows(8):
        verifier = WordErrorVerifier(listen, row["text"], unit="character", normalize=str)
        prompt = speech_prompt(tokenizer, vocabulary, row["text"])
        for n in errors:
            result = best_of_n(
                model, prompt, verifier, n, vocabulary=vocabulary, max_new_tokens=24, do_sample=True, top_k=0
            )
            errors[n] -= result.score / 8
    assert errors[16] < 0.5 * errors[1]


def test_a_checkpoint_resumes_and_its_tokenizer_and_embedding_agree(tmp_path):
    tokenizer, model = text_tokenizer(), llama(261)
    vocabulary = add_speech_tokens(tokenizer, CODES, model=model)
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = trained(tmp_path, model, tokenizer, vocabulary, **options)

    checkpoint = tmp_path / "checkpoint-3"
    loaded = AutoTokenizer.from_pretrained(checkpoint)
    again = AutoModelForCausalLM.from_pretrained(checkpoint)
    rows_before = again.get_input_embeddings().weight.clone()
    assert add_speech_tokens(loaded, CODES, model=again) == vocabulary
    assert torch.equal(again.get_input_embeddings().weight, rows_before)
    assert len(loaded) == again.get_input_embeddings().weight.shape[0]

    collator = SpeechTokenCollator(loaded, vocabulary, max_length=128)
    args = arguments(tmp_path, learning_rate=5e-3, remove_unused_columns=False, **options)
    resumed = Trainer(again, args, train_dataset=rows(256), data_collator=collator, processing_class=loaded)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_gradient_accumulation_weighs_by_tokens(tmp_path):
    """One batch of eight rows and four of two take the same step."""
    losses = []
    for size, steps in ((8, 1), (2, 4)):
        tokenizer, vocabulary = speech_tokenizer()
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 2}
        trainer = trained(tmp_path, llama(len(tokenizer)), tokenizer, vocabulary, **options)
        losses.append([row["loss"] for row in training_logs(trainer)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_lora_trains_the_new_rows_and_only_those(tmp_path):
    tokenizer, model = text_tokenizer(), llama(261)
    vocabulary = add_speech_tokens(tokenizer, CODES, model=model)
    before = model.get_input_embeddings().weight.detach().clone()
    adapted = get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], trainable_token_indices=vocabulary.token_ids)
    )
    trained(tmp_path, adapted, tokenizer, vocabulary, max_steps=4)
    merged = adapted.merge_and_unload()
    after = merged.get_input_embeddings().weight
    assert after is merged.get_output_embeddings().weight
    assert torch.equal(after[:261], before[:261])
    changed = (after != before).any(dim=1)
    assert changed[vocabulary.first_code :].all()
    assert changed[vocabulary.end_id]
    result = best_of_n(
        merged, speech_prompt(tokenizer, vocabulary, "ab"), lambda c: [0.0] * len(c), 2, vocabulary=vocabulary
    )
    assert result.candidates


def test_rows_that_never_occur_stay_finite(tmp_path):
    """Text is not in the loss, so most markers have a gradient of zero inside a tensor that has others."""
    tokenizer, model = text_tokenizer(), llama(261, tie_word_embeddings=False)
    vocabulary = add_speech_tokens(tokenizer, CODES, model=model)
    unused = vocabulary.markers["<|TEXT_GENERATION_START|>"]
    before = model.get_input_embeddings().weight.detach()[unused].clone()
    trained(tmp_path, model, tokenizer, vocabulary, max_steps=4)
    assert torch.equal(model.get_input_embeddings().weight[unused], before)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
