"""A tiny target with a tokenizer of letters, and data sets for it."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_stablespam.recipes.fusechat import build_preference_dataset
from tests.trainer.helpers import tiny_llama

LETTERS = "abcdefghijklmnop"
CHAT = "{% for m in messages %}{{ m['role'][0] | upper }}{{ m['content'] }}"
CHAT += "{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}A{% endif %}"


def tokenizer(chat=False):
    words = ["<pad>", "</s>", "<unk>", "U", "A", "S", *LETTERS]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )
    if chat:
        made.chat_template = CHAT
    return made


def target(**overrides):
    shape = {
        "vocab_size": 32,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
        "max_position_embeddings": 64,
    }
    return tiny_llama(**{**shape, **overrides})


def scored_rows(prompts=12, chat=False):
    """Two sources; the reward is the place of an answer's first letter."""
    rows = []
    for i in range(prompts):
        text = LETTERS[i] + LETTERS[i // 2]
        prompt = [{"role": "user", "content": text}] if chat else text
        for source in (0, 1):
            for answer in (0, 1, 2):
                letter = LETTERS[(i + source + 3 * answer) % 16]
                reward = 0.1 + 0.02 * answer + 0.001 * source
                rows.append({"prompt": prompt, "source": "AB"[source], "response": letter * 4, "reward": reward})
    return rows


def preferences(chat=False, **options):
    return build_preference_dataset(scored_rows(chat=chat), **options)
