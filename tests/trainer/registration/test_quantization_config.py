"""`quantization_config=FourBitConfig(…)`: every `from_pretrained` converts, saves and finds it again."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer, pipeline

from hf_stablespam import FourBitCallback, FourBitConfig, convert_to_4bit, register, restore_linear, unregister
from hf_stablespam.quant import FourBitLinear
from hf_stablespam.trainer.export_checkpoint import export_checkpoint
from tests.processes import run_code
from tests.quant.export.gguf.models import byte_level_tokenizer, tiny
from tests.trainer.helpers import RandomTokens, arguments

CONFIG = FourBitConfig("int4_signed", "int4", group_size=32)
IDS = torch.arange(20).view(1, 20)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("plain")
    tiny(tie_word_embeddings=False).save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def loaded(plain: str) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(plain, quantization_config=CONFIG, dtype=torch.float32).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_the_model_is_that_of_convert_to_4bit(plain: str, loaded: LlamaForCausalLM) -> None:
    assert isinstance(loaded.model.layers[0].mlp.up_proj, FourBitLinear)
    assert loaded.model.layers[0].mlp.up_proj.four_bit == CONFIG
    assert type(loaded.lm_head) is torch.nn.Linear
    converted = convert_to_4bit(AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval(), CONFIG)
    assert torch.equal(logits(loaded), logits(converted))


def test_it_is_trained_saved_and_found_again(loaded: LlamaForCausalLM, tmp_path: Path) -> None:
    trainer = Trainer(
        loaded, arguments(tmp_path, max_steps=2), train_dataset=RandomTokens(), callbacks=[FourBitCallback()]
    )
    assert trainer.callback_handler.callbacks[-1] is not None
    before = loaded.model.layers[0].mlp.up_proj.weight.detach().clone()
    trainer.train()
    assert not torch.equal(loaded.model.layers[0].mlp.up_proj.weight, before)
    trainer.save_model(str(tmp_path / "trained"))
    written = json.loads((tmp_path / "trained" / "config.json").read_text())["quantization_config"]
    assert written["quant_method"] == "hf_stablespam"
    assert written["weight"] == "int4_signed"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "trained", dtype=torch.float32).eval()
    assert again.model.layers[0].mlp.up_proj.four_bit == CONFIG
    assert torch.equal(logits(again), logits(loaded.eval()))
    again.save_pretrained(tmp_path / "twice")
    assert json.loads((tmp_path / "twice" / "config.json").read_text())["quantization_config"] == written


def test_the_state_dict_that_is_given_is_the_one_that_is_saved(loaded: LlamaForCausalLM, tmp_path: Path) -> None:
    """FSDP gives the gathered one: transformers ignores it for models that it takes for quantized."""
    state = {name: torch.ones_like(tensor) for name, tensor in loaded.state_dict().items()}
    loaded.save_pretrained(tmp_path, state_dict=state)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert (again.model.layers[0].mlp.up_proj.weight == 1).all() or transformers.__version__ < "5"


def test_restored_it_is_saved_as_a_plain_model(loaded: LlamaForCausalLM, tmp_path: Path) -> None:
    restore_linear(loaded).save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again.model.layers[0].mlp.up_proj) is torch.nn.Linear


def test_an_unregistered_process_is_told_the_packages_name(loaded: LlamaForCausalLM, tmp_path: Path) -> None:
    loaded.save_pretrained(tmp_path)
    code = (
        "import sys, transformers; transformers.logging.set_verbosity_warning();"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r});"
        "print(type(model.model.layers[0].mlp.up_proj).__name__, 'hf_stablespam' in sys.modules)"
    )
    written, errors = run_code(code)
    assert written.split() == ["Linear", "False"]
    assert "hf_stablespam" in errors


def test_another_configuration_in_the_callback_is_refused(loaded: LlamaForCausalLM, tmp_path: Path) -> None:
    callback = FourBitCallback(FourBitConfig("nvfp4", None))
    with pytest.raises(ValueError, match=r"already converted with another configuration; call restore_linear"):
        Trainer(loaded, arguments(tmp_path), train_dataset=RandomTokens(), callbacks=[callback])
    Trainer(loaded, arguments(tmp_path), train_dataset=RandomTokens(), callbacks=[FourBitCallback(CONFIG)])


def test_the_configuration_of_the_model_equals_the_given_one_and_is_copied(loaded: LlamaForCausalLM) -> None:
    own = loaded.config.quantization_config
    for same in (own, copy.deepcopy(loaded.config).quantization_config, pickle.loads(pickle.dumps(own))):
        assert same == CONFIG
        assert same == CONFIG
        assert hash(same) == hash(CONFIG)
    assert own != FourBitConfig()
    convert_to_4bit(loaded, own)  # the same again


def test_a_pipeline_computes_in_4_bits(plain: str) -> None:
    writer = pipeline("text-generation", plain, model_kwargs={"quantization_config": CONFIG})
    assert isinstance(writer.model.model.layers[0].mlp.up_proj, FourBitLinear)
    assert writer("Debian is", max_new_tokens=2, do_sample=False)[0]["generated_text"].startswith("Debian is")


def test_trl_takes_it_in_model_init_kwargs(plain: str, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed: it is in the extra dev")
    from datasets import Dataset

    args = trl.SFTConfig(
        str(tmp_path),
        model_init_kwargs={"quantization_config": CONFIG, "dtype": "float32"},
        optim="stable_spam",
        max_grad_norm=0.0,
        max_steps=2,
        max_length=32,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    data = Dataset.from_dict({"text": ["Debian is a free operating system."] * 8})
    trainer = trl.SFTTrainer(plain, args, train_dataset=data, callbacks=[FourBitCallback()])
    assert trainer.model.model.layers[0].mlp.up_proj.four_bit == CONFIG
    trainer.train()


def test_an_adapter_of_peft_is_trained_on_it(loaded: LlamaForCausalLM, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(loaded, LoraConfig(target_modules=["q_proj", "up_proj"]))
    Trainer(model, arguments(tmp_path, max_steps=1), train_dataset=RandomTokens()).train()
    assert isinstance(model.merge_and_unload().model.layers[0].mlp.up_proj, FourBitLinear)


@pytest.mark.parametrize("to", ["gguf", "compressed-tensors", "unpacked"])
def test_such_a_checkpoint_is_exported(to: str, loaded: LlamaForCausalLM, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="GGUF files need it; install the extra 'gguf'")
    pytest.importorskip("compressed_tensors", reason="export needs it; install the extra 'export'")
    loaded.save_pretrained(tmp_path / "run")
    export_checkpoint(tmp_path / "run", tmp_path / "out", to=to)
    if to == "gguf":
        assert (tmp_path / "out").read_bytes()[:4] == b"GGUF"
        return
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert not any(isinstance(module, FourBitLinear) for module in again.modules())


def test_unregister_forgets_it_and_register_knows_it_again(plain: str) -> None:
    unregister()
    try:
        with pytest.raises(ValueError, match="hf_stablespam"):
            AutoModelForCausalLM.from_pretrained(plain, quantization_config=CONFIG)
    finally:
        register()
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=CONFIG)
