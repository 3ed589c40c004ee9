"""The golden files, their tokenizer with 32 codes, and a tiny Llama for it."""

import json
from functools import cache
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_stablespam.recipes.llasa import add_speech_tokens

DATA = Path(__file__).parents[2] / "data" / "llasa"
CODES = 32
PAD = "<|finetune_right_pad_id|>"


@cache
def golden(name: str) -> dict:
    return json.loads((DATA / f"llasa_{name}.json").read_text())


def text_tokenizer(pad_token: str | None = PAD) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(DATA / "tokenizer")
    tokenizer.pad_token = pad_token
    return tokenizer


def speech_tokenizer(codes: int = CODES):
    """The tokenizer with its speech tokens, and where they lie."""
    tokenizer = text_tokenizer()
    return tokenizer, add_speech_tokens(tokenizer, codes)


def llama(rows: int, *, seed: int = 0, **overrides) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    shape = {
        **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"num_key_value_heads": 1, "max_position_embeddings": 512, "initializer_range": 0.2},
        **{"tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None},
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=rows, **{**shape, **overrides})).eval()
