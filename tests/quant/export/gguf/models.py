"""Tiny random models of every architecture that is written as GGUF directly, real tokenizers, a stand-in converter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 384
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,  # so large that logits tell a wrong order of rows from the right one
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
GEMMA = {"query_pre_attn_scalar": 32, "sliding_window": 16}
# Class → what differs from `SHAPE`.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"attention_bias": True, "tie_word_embeddings": True},
    "MistralForCausalLM": {"sliding_window": 128},
    "Qwen2ForCausalLM": {},
    "Qwen3ForCausalLM": {"tie_word_embeddings": True},
    "SmolLM3ForCausalLM": {"num_hidden_layers": 4},
    "GraniteForCausalLM": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.1,
        "logits_scaling": 2.0,
    },
    "Phi3ForCausalLM": {},
    "Olmo2ForCausalLM": {},
    "Starcoder2ForCausalLM": {"hidden_act": "gelu_pytorch_tanh"},
    "GemmaForCausalLM": {"hidden_activation": "gelu_pytorch_tanh", "hidden_act": "gelu_pytorch_tanh"},
    "Gemma2ForCausalLM": GEMMA,
    "Gemma3ForCausalLM": {**GEMMA, "num_hidden_layers": 6},
}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
MIXTURES: dict[str, dict[str, Any]] = {
    "MixtralForCausalLM": EXPERTS,
    "Qwen2MoeForCausalLM": {**EXPERTS, "shared_expert_intermediate_size": 96},
    "Qwen3MoeForCausalLM": {**EXPERTS, "norm_topk_prob": True},
    "OlmoeForCausalLM": {**EXPERTS, "num_key_value_heads": 4},
    "GraniteMoeForCausalLM": {
        **EXPERTS,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.1,
        "logits_scaling": 2.0,
    },
    "GptOssForCausalLM": {**EXPERTS, "sliding_window": 16},
}

SCALING = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}


def tiny(name: str = "LlamaForCausalLM", **options: Any) -> Any:
    """A random model of the class `name`, in float32."""
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**{**SHAPE, **{**ARCHITECTURES, **MIXTURES}[name], **options}))
    for parameter in model.parameters():  # biases and norms are made as zeros and ones, which hide mistakes
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, parameter.mean().item(), 0.2)
    for name, parameter in model.named_parameters():
        if name.endswith("_proj_bias"):
            torch.nn.init.normal_(parameter, 0.0, 0.2)
        if name.endswith((".gate.weight", ".router.weight")):  # decided, so that no rounding sends a token elsewhere
            torch.nn.init.normal_(parameter, 0.0, 1.0)
    return model.eval()


TEXT = [
    "Debian is a free operating system.",
    "It's 1234 packages, or 56,789?",
    "  Spaces\n\nand lines\tand   more …",
    "naïve Ωmega",
]


def byte_level_tokenizer(pre: Any = None, size: int = 320) -> PreTrainedTokenizerFast:
    """A byte-level BPE, trained on four lines.

    Args:
        pre: the pre-tokenizer; default: GPT-2's.
        size: of the vocabulary.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 8, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>", pad_token="<|end|>"
    )
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return fast


def splitting(pattern: str) -> Any:
    """The pre-tokenizer that cuts a text by a regular expression before it takes the bytes."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def sentencepiece_tokenizer(size: int = 380) -> PreTrainedTokenizerFast:
    """A BPE in the manner of SentencePiece: spaces as ▁, bytes for what it does not know."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([f"▁{line}".replace(" ", "▁") for line in TEXT * 8], trainer)
    spec = Tokenizer.from_str(_without_special_bytes(tokenizer.to_str()))
    return PreTrainedTokenizerFast(tokenizer_object=spec, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _without_special_bytes(text: str) -> str:
    """The bytes are ordinary tokens in real vocabularies; the trainer only knows how to add them as special ones."""
    spec = json.loads(text)
    spec["added_tokens"] = [token for token in spec["added_tokens"] if not token["content"].startswith("<0x")]
    return json.dumps(spec)


def write_float_gguf(folder: Path, file: Path, dtype: type = np.float16) -> Path:
    """What llama.cpp's converter does, for an architecture that nobody here knows: names, and rows in another order.

    The matrices of experts, one each in a checkpoint, become one tensor, as there.

    Args:
        folder: a checkpoint.
        file: what to write.
        dtype: of its matrices.
    """
    import gguf

    writer = gguf.GGUFWriter(file, "strange")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_string("strange.word", "kept")
    writer.add_array("strange.list", [3, 4])
    writer.add_token_list(["a", "b"])
    names = {"model.embed_tokens.weight": "token_embd.weight", "lm_head.weight": "output.weight"}
    for path in sorted(folder.glob("*.safetensors")):
        for key, tensor in _joined_experts(load_file(path)).items():
            numbers = tensor.float().flip(0) if "q_proj" in key else tensor.float()
            writer.add_tensor(names.get(key, key), numbers.numpy().astype(dtype if tensor.ndim > 1 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _joined_experts(tensors: dict[str, Any]) -> dict[str, Any]:
    single = {key: tensor for key, tensor in tensors.items() if ".experts." in key and tensor.ndim == 2}
    several: dict[str, dict[int, Any]] = {}
    for key, tensor in single.items():
        before, after = key.split(".experts.")
        several.setdefault(f"{before}.{after.partition('.')[2]}", {})[int(after.partition(".")[0])] = tensor
    joined = {key: torch.stack([parts[index] for index in sorted(parts)]) for key, parts in several.items()}
    return {key: tensor for key, tensor in tensors.items() if key not in single} | joined
