"""Exports that are whole: on a full disk, of sharded models, of mixtures; and those of which nothing would be left."""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

pytest.importorskip("compressed_tensors", reason="export needs it; install the extra 'export'")
import peft
import safetensors.torch
import transformers as tf

from hf_stablespam._atomic import atomic_file, atomic_folder
from hf_stablespam.quant import FourBitConfig, convert_to_4bit, export_4bit, export_gguf
from hf_stablespam.quant.export.checks import check_finite, check_packable
from hf_stablespam.quant.export.unpacked import export_unpacked
from tests.processes import run_processes
from tests.quant.layers import mixtures

INT4 = FourBitConfig("int4", None, group_size=32)
IDS = torch.arange(16).reshape(2, 8)


def llama(**options: Any) -> tf.PreTrainedModel:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return tf.LlamaForCausalLM(tf.LlamaConfig(**{"vocab_size": 64, "num_key_value_heads": 4, **shape, **options}))


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


class TestFullDisk:
    @pytest.fixture
    def full(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As safetensors says it, when a part of the file is there."""
        original = safetensors.torch.save_file

        def save_file(tensors: dict, filename: Any, metadata: Any = None) -> None:
            original(tensors, filename, metadata)
            os.truncate(filename, 1000)
            raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

        monkeypatch.setattr(tf.modeling_utils, "safe_save_file", save_file)

    @pytest.mark.usefixtures("full")
    @pytest.mark.parametrize("export", [export_4bit, export_unpacked])
    def test_nothing_is_left(self, export: Any, tmp_path: Path) -> None:
        model = convert_to_4bit(llama(), INT4)
        with pytest.raises(
            OSError, match=r"out could not be written, and is what it was: .*No space left.*MiB are free"
        ):
            export(model, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    def test_an_earlier_export_is_what_it_was(self, tmp_path: Path, request: pytest.FixtureRequest) -> None:
        export_4bit(convert_to_4bit(llama(), INT4), tmp_path / "out")
        before = files(tmp_path / "out")
        request.getfixturevalue("full")
        with pytest.raises(OSError, match="No space left"):
            export_4bit(convert_to_4bit(llama(num_hidden_layers=1), INT4), tmp_path / "out")
        assert files(tmp_path / "out") == before
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_smaller_export_replaces_a_larger_one_whole(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/README.md").write_text("ours")
    model = convert_to_4bit(llama(), INT4)
    model.save_pretrained(tmp_path / "out", max_shard_size="50KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    export_4bit(model, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors*")] == ["model.safetensors"]
    assert (tmp_path / "out/README.md").read_text() == "ours"
    tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_what_would_be_read_with_the_new_files_goes_with_the_old_ones(tmp_path: Path) -> None:
    """A chat template, or the widths of a pruned model, that the new export does not have."""
    old = ("pruning.json", "chat_template.jinja", "vocab.json", "README.md", "preprocessor_config.json")
    for name in old:
        (tmp_path / name).write_text("old")
    with atomic_folder(tmp_path) as folder:
        (folder / "model.safetensors").write_text("new")
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", *old[1:]}
    with atomic_folder(tmp_path) as folder:
        for name in ("model.safetensors", "tokenizer.json"):
            (folder / name).write_text("new")
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "tokenizer.json", *old[3:]}


def test_files_appear_whole_with_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    with pytest.raises(TypeError), atomic_file(tmp_path / "new/file") as path:
        path.write_text(b"no text")
    assert not (tmp_path / "new/file").exists()
    with atomic_file(tmp_path / "new/file") as path:
        path.write_text("whole")
    with atomic_folder(tmp_path / "folder") as folder:
        (folder / "sub").mkdir()
        (folder / "sub/file").write_text("whole")
    assert (tmp_path / "folder/sub/file").read_text() == (tmp_path / "new/file").read_text() == "whole"
    assert (tmp_path / "new/file").stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "plain folder").mkdir()
    assert (tmp_path / "folder").stat().st_mode == (tmp_path / "plain folder").stat().st_mode
    assert {path.name for path in tmp_path.iterdir()} == {"plain", "plain folder", "new", "folder"}


def test_an_export_of_nothing_is_an_error(tmp_path: Path) -> None:
    model = convert_to_4bit(llama(), FourBitConfig("int4", None, group_size=96))
    with pytest.raises(ValueError, match=r"nothing would be packed: model.layers.0.self_attn.q_proj has 64 inputs"):
        export_4bit(model, tmp_path / "out", leave_unpackable=True)
    assert list(tmp_path.iterdir()) == []


def test_models_that_transformers_cannot_load_plainly_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    """Its initialization of RWKV takes a linear layer's weight for granted."""
    options = {"attention_hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "context_length": 16}
    rwkv = tf.RwkvForCausalLM(tf.RwkvConfig(vocab_size=64, hidden_size=64, **options))
    convert_to_4bit(rwkv, INT4)
    state = torch.get_rng_state()
    with caplog.at_level(logging.WARNING, logger="hf_stablespam"):
        check_packable(rwkv)
        assert torch.equal(torch.get_rng_state(), state)
        assert "RwkvForCausalLM: transformers fails to load packed layers of this model plainly" in caplog.text
        assert "CompressedTensorsConfig(dequantize=True)" in caplog.text
        caplog.clear()
        check_packable(convert_to_4bit(llama(), INT4))
        assert caplog.text == ""


@pytest.mark.parametrize("left", [{"modules_to_not_convert": ("lm_head", "experts")}, {"keep_last_blocks": 1}])
def test_experts_in_high_precision_beside_packed_layers(left: dict[str, Any], tmp_path: Path) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = {"num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2, "num_key_value_heads": 4}
    torch.manual_seed(0)
    model = tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(vocab_size=64, head_dim=16, **shape, **experts)).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    convert_to_4bit(model, FourBitConfig("int4", None, group_size=32, **left))
    if "keep_last_blocks" in left:
        with pytest.raises(ValueError, match="experts cannot be packed: some blocks of experts are in high precision"):
            export_4bit(model, tmp_path)
    export_4bit(model, tmp_path, leave_unpackable="keep_last_blocks" in left)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def sharded(model: tf.PreTrainedModel) -> tf.PreTrainedModel:
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def gpt_oss() -> tf.PreTrainedModel:
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16}
    return tf.GptOssForCausalLM(tf.GptOssConfig(num_attention_heads=4, num_local_experts=4, pad_token_id=0, **shape))


GGUF = {
    "nvfp4": lambda: convert_to_4bit(llama(tie_word_embeddings=True), FourBitConfig("nvfp4", None)),
    "mixture": lambda: convert_to_4bit(gpt_oss(), FourBitConfig("mxfp4", None)),
}


def mixture(family: str, config: FourBitConfig) -> Any:
    return lambda: convert_to_4bit(mixtures.mixture(family), config)


# Models and options of `export_4bit`: layers packed and not, experts packed, rounded and in their own layout.
WIDE = FourBitConfig("int4", None, group_size=64)
PACKED = {
    "unpackable": (lambda: convert_to_4bit(llama(intermediate_size=96), WIDE), {"leave_unpackable": True}),
    "calibrated": (lambda: convert_to_4bit(llama(), FourBitConfig.nvfp4()), {"activations": True}),
}
if mixtures.HAS_SHARED_FORM:
    MXFP4, NVFP4 = FourBitConfig("mxfp4", None), FourBitConfig("nvfp4", None)
    PACKED |= {f"{family} int4": (mixture(family, INT4), {}) for family in ("mixtral", "qwen3_moe")}
    PACKED |= {f"{family} mxfp4": (mixture(family, MXFP4), {}) for family in mixtures.FAMILIES}
    PACKED |= {"mixtral nvfp4": (mixture("mixtral", NVFP4), {"leave_unpackable": True})}


def work(folder: Path) -> None:
    main = dist.get_rank() == 0
    model = sharded(convert_to_4bit(llama(tie_word_embeddings=True), INT4))
    export_4bit(model, folder / "sharded", is_main_process=main)
    export_unpacked(model, folder / "sharded-unpacked", is_main_process=main)
    if importlib.util.find_spec("gguf") is not None:
        for name, make in GGUF.items():
            export_gguf(sharded(make()), folder / f"sharded {name}.gguf", is_main_process=main)
    for name, (make, options) in PACKED.items():
        # The largest inputs are in the batch of the second process.
        batches = {"calibration": [{"input_ids": IDS + 8 * dist.get_rank()}]} if name == "calibrated" else {}
        export_4bit(sharded(make()), folder / f"sharded {name}", is_main_process=main, **options, **batches)
    refuse_what_one_process_alone_sees()
    refuse_adapters_that_are_wrapped_by_themselves()
    dist.barrier()


def refuse_what_one_process_alone_sees() -> None:
    """The others would wait for it when they gather."""
    model = sharded(convert_to_4bit(llama(), INT4))
    if dist.get_rank() == 1:
        model.model.layers[0].mlp.up_proj.weight.to_local().data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"got nan or inf in model.layers.0.mlp.up_proj.weight;"):
        check_finite(dict(model.named_parameters()))


def refuse_adapters_that_are_wrapped_by_themselves() -> None:
    """As FSDP2 is told to by a policy that names LoRA's small layers: their weights are shards outside of them."""
    model = convert_to_4bit(llama(), FourBitConfig("int4", None, group_size=32, adapters="merged"))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    convert_to_4bit(adapted, FourBitConfig("int4", None, group_size=32, adapters="merged"))
    for name, module in adapted.named_modules():
        if name.endswith(("lora_A.default", "lora_B.default")):
            fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    with pytest.raises(ValueError, match=r"lora_A and lora_B are sharded by themselves.*wrap whole blocks by FSDP2"):
        adapted(IDS)


@pytest.mark.slow
def test_two_processes_export_the_same_files_as_one(tmp_path: Path) -> None:
    """The memory of a gathered tensor is given to the next one: tensors are known by their parameters."""
    run_processes(2, work, tmp_path)
    model = convert_to_4bit(llama(tie_word_embeddings=True), INT4)
    export_4bit(model, tmp_path / "one")
    export_unpacked(model, tmp_path / "one-unpacked")
    for name, (make, options) in PACKED.items():
        batches = {"calibration": [{"input_ids": IDS}, {"input_ids": IDS + 8}]} if name == "calibrated" else {}
        export_4bit(make(), tmp_path / f"one {name}", **options, **batches)
    for name in ("", "-unpacked", *(f" {name}" for name in PACKED)):
        sharded, one = (files(tmp_path / f"{kind}{name}") for kind in ("sharded", "one"))
        assert sharded.keys() == one.keys()
        assert all(sharded[file] == one[file] for file in one), name
    for name, make in GGUF.items() if importlib.util.find_spec("gguf") is not None else ():
        export_gguf(make(), tmp_path / f"one {name}.gguf")
        assert (tmp_path / f"sharded {name}.gguf").read_bytes() == (tmp_path / f"one {name}.gguf").read_bytes(), name


def test_scales_that_transformers_would_load_in_another_dtype_are_warned_about(caplog: Any) -> None:
    model = convert_to_4bit(llama(), INT4)
    model._keep_in_fp32_modules_strict = {"scale"}  # as HYV4 has it
    with caplog.at_level(logging.WARNING, logger="hf_stablespam"):
        check_packable(model)
    assert "'scale' in float32, and so the packed layers' weight_scale" in caplog.text
    assert "from_pretrained(..., dtype=torch.float32) loads the checkpoint" in caplog.text
